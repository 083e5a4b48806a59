"""What could stop a run, each kind of check in a file of its own; `softprompt doctor` runs them."""
