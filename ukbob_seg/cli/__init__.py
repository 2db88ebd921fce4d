"""One file per command: parse arguments, call one library function, print."""
