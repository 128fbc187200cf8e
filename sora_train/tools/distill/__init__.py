"""`sora distill`: the training run that distills another into few steps without guidance."""
