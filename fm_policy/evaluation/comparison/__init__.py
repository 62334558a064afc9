"""A table of methods and tasks: what it shows, how its cells are filled, and how it is written."""
