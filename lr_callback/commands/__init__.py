"""The command line's commands, and what several of them do alike."""
