"""What can be known before any GPU-hour is spent: are the hosts alike, is all in reach, does a step work, how long will
it take."""
