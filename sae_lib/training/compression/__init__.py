"""Study 4: masks that keep a share of the latents."""
