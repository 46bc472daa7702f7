"""One image: decoding within limits, colour profiles, crops, borders, line drawings, perceptual hashes."""
