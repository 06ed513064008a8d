from evertune.callbacks import WeightMethod


class L2SP(WeightMethod):
    """Pull the weights back to where the last experience left them (L2-SP; Li et al. 2018).

    Adds ``(strength / 2) * sum_i (theta_i - anchor_i)^2`` to the loss, on the gradient. Weights that are new since the
    anchor was taken (a grown head) are pulled to zero, as in the paper.
    """

    tensor_names = ("anchor",)

    def __init__(self, strength=0.1):
        self.strength = strength

    def consolidate(self, trainer, module, shards):
        return {"anchor": shards.values()}

    def add_to_gradient(self, shards):
        pairs = zip(shards.values(), self.tensors["anchor"], strict=True)
        shards.add_to_gradient(self.strength * (value - anchor) for value, anchor in pairs)
