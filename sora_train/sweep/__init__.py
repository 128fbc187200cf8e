"""Many runs of one configuration: expanded, run or submitted, searched, and compared."""
