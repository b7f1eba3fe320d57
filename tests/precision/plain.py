"""8-bit products in plain words: each value to the nearest of all codes, block by block. What the recipes are held against."""

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def nearest(values, dtype):
    """The number of the format that is nearest to each value, of two equally near the one with an even code."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(dtype).double()
    usable = numbers.isfinite() & (codes != 0x80)
    codes, numbers = codes[usable], numbers[usable]
    distance = (values.double().unsqueeze(-1) - numbers).abs()
    odd = (codes % 2).double()
    closest = distance.min(-1, keepdim=True).values
    candidate = torch.where(distance == closest, odd, 2.0)
    return numbers[candidate.argmin(-1)]


def through_fp8(matrix, height, width, dtype=E4M3, power_of_two=True):
    """What a matrix becomes where each block of height x width has its own scale; 0 stands for all rows or columns."""
    rows, columns = matrix.shape
    height, width = height or rows, width or columns
    found = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            block = matrix[row : row + height, column : column + width].float()
            largest = block.abs().max()
            scale = LARGEST[dtype] / largest if largest > 0 else torch.tensor(1.0)
            if power_of_two:
                scale = 2.0 ** torch.floor(torch.log2(scale.double())).float()
            there = nearest(block * scale, dtype) / scale.double()
            found[row : row + height, column : column + width] = there
    return found


def products(recipe, x, weight, grad):
    """(y, dx, dW) of a linear layer by a recipe. Shapes: x [N, H], weight [F, H], grad [N, F]"""

    def multiply(a, how_a, b, how_b):
        return through_fp8(a, *how_a) @ through_fp8(b, *how_b).t()

    row, tensor = (1, 0), (0, 0, E4M3, False)
    if recipe == "tensorwise":
        gradient = (0, 0, E5M2, False)
        forward, backward, last = (tensor, tensor), (gradient, tensor), (gradient, tensor)
    elif recipe in ("rowwise", "rowwise_wide"):
        forward = backward = last = (row, row)
    elif recipe == "blockwise":
        forward = backward = ((1, 128), (128, 128))
        last = ((1, 128), (1, 128))
    else:
        forward = backward = last = ((1, 32), (1, 32))
    y = multiply(x, forward[0], weight, forward[1])
    dx = multiply(grad, backward[0], weight.t(), backward[1])
    if recipe == "rowwise_wide":
        return y, dx, grad.double().t() @ x.double()
    return y, dx, multiply(grad.t(), last[0], x.t(), last[1])
