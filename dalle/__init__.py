"""The generator: an autoregressive transformer over [text | image] and all that turns a sentence into pictures."""
