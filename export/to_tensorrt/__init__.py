"""The target `tensorrt`: a plan and a graph, and engines built where they run."""
