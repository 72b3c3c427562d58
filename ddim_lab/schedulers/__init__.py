"""diffusers' schedulers: what each is of, and any that fits as a formula on our model, noise and x_T."""
