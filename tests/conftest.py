"""What holds for all tests."""
import signal

# A shell starts what it runs in the background with SIGINT ignored (POSIX, "Asynchronous Lists"),
# and so would be each command that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
