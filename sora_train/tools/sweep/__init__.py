"""`sora train -m` and `sora sweep`: many runs of one configuration: expanded, run or submitted, searched."""
