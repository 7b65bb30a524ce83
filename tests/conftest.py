"""What all tests start from."""

import signal

# a shell that starts the tests in the background leaves Ctrl-C ignored, in their children too
signal.signal(signal.SIGINT, signal.default_int_handler)
