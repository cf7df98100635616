"""Study: methods compared on one network, right after the cut and after training on, with a dense control."""
