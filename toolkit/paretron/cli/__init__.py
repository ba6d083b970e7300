"""The command line: one thin file a verb, each importing what it runs only when it runs."""
