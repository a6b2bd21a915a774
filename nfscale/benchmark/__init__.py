"""Side by side with what a user would write instead: ratios measured in one run, interleaved, medians and minima."""
