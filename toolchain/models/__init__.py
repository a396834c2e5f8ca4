"""Models: their names and folders, what is checked of them, their architectures, loading."""
