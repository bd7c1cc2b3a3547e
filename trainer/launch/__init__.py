"""Before the first step: the command line, what the machine has, who owns the folder."""
