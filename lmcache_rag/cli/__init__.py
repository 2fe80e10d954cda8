"""The command line. Importing this package imports none of it: Ctrl-C is taken care of first."""
