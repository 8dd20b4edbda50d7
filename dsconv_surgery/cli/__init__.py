"""The command line: `dsconv-surgery`."""
