"""A page that says what a compression did: one file of HTML, from plain data."""
