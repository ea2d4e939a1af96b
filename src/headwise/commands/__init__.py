"""The commands, a module each: `main(argv)` parses its arguments and calls what does the work."""
