"""The method on real images: teachers, distillations and their judges, over any number of short sittings."""
