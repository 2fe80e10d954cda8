"""What is learned once per model: codec tables and primers."""
