"""The command line, the pipeline and everything that runs on Ray."""
