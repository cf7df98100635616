"""What knows nothing of networks: tasks, processes, files, tables, and a model left as it was."""
