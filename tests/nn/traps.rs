//! Gradients of candle's own methods of `Tensor`, which `nn` cannot replace: those that its page lists as wrong or as
//! errors are, and what it names instead is right. Those of `conv1d` are in `frozen.rs`.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use cases::random;

/// The slope of a function along a direction through a variable: by its gradient, and by differences.
fn slopes(dims: &[usize], function: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(f64, f64)> {
    let x = Var::from_tensor(&random(dims, DType::F64, 1)?)?;
    let direction = random(dims, DType::F64, 2)?;
    let dy = random(function(&x)?.dims(), DType::F64, 3)?;
    let loss = |x: &Tensor| -> Result<Tensor> { (function(x)? * &dy)?.sum_all() };
    let grads = loss(&x)?.backward()?;
    let grad = grads.get(&x).expect("a gradient");
    let slope = (grad * &direction)?.sum_all()?.to_scalar()?;
    let h = 1e-6;
    let at = |step: f64| -> Result<f64> {
        loss(&(x.as_detached_tensor() + (&direction * step)?)?)?.to_scalar()
    };
    Ok((slope, (at(h)? - at(-h)?) / (2. * h)))
}

/// All of these are piecewise linear, and no number of theirs is near another: differences of f64 at a step of 1e-6
/// have nine digits or so.
fn is_off(dims: &[usize], function: impl Fn(&Tensor) -> Result<Tensor>) -> Result<f64> {
    let (slope, difference) = slopes(dims, function)?;
    Ok((slope - difference).abs())
}

#[track_caller]
fn is_right(name: &str, dims: &[usize], function: impl Fn(&Tensor) -> Result<Tensor>) {
    let off = is_off(dims, function).expect("a gradient");
    assert!(off <= 1e-6, "{name} is off by {off}");
}

#[track_caller]
fn is_wrong(name: &str, dims: &[usize], function: impl Fn(&Tensor) -> Result<Tensor>) {
    let off = is_off(dims, function).expect("a gradient");
    assert!(off > 1e-2, "{name}: candle is mended: strike it from the lists ({off})");
}

#[track_caller]
fn has_none(name: &str, dims: &[usize], function: impl Fn(&Tensor) -> Result<Tensor>) {
    let error = slopes(dims, function).expect_err(name).to_string();
    assert!(error.contains("not supported"), "{name}: {error}");
}

/// Windows of `size` by `size`, the last two dimensions.
fn windows(x: &Tensor, size: usize) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    let (rows, cols) = (h / size, w / size);
    let whole = x.narrow(2, 0, rows * size)?.narrow(3, 0, cols * size)?;
    whole.reshape(&[n, c, rows, size, cols, size][..])?.transpose(3, 4)
}

#[test]
fn pooling() {
    for dims in [[1, 2, 4, 6], [2, 3, 5, 7]] {
        is_wrong("max_pool2d", &dims, |x| x.max_pool2d(2));
        let by_max = |x: &Tensor| windows(x, 2)?.flatten_from(4)?.max(D::Minus1);
        is_right("max of windows", &dims, by_max);
        let x = random(&dims, DType::F64, 4).expect("numbers");
        let (ours, candles) = (by_max(&x).expect("maxima"), x.max_pool2d(2).expect("maxima"));
        assert_eq!(
            ours.flatten_all().and_then(|y| y.to_vec1::<f64>()).expect("numbers"),
            candles.flatten_all().and_then(|y| y.to_vec1::<f64>()).expect("numbers")
        );
    }
    is_right("avg_pool2d", &[1, 2, 4, 6], |x| x.avg_pool2d(2));
    is_wrong("avg_pool2d with a remainder", &[2, 3, 5, 7], |x| x.avg_pool2d(2));
    is_right("avg_pool2d of whole windows", &[2, 3, 5, 7], |x| {
        x.narrow(2, 0, 4)?.narrow(3, 0, 6)?.avg_pool2d(2)
    });
    has_none("avg_pool2d", &[1, 2, 4, 6], |x| x.avg_pool2d_with_stride(2, 1));
    has_none("max_pool2d", &[1, 2, 4, 6], |x| x.max_pool2d_with_stride(2, 1));
}

#[test]
fn upsampling() {
    is_right("upsample_nearest1d", &[1, 2, 3], |x| x.upsample_nearest1d(6));
    is_right("upsample_nearest2d", &[1, 2, 3, 4], |x| x.upsample_nearest2d(6, 8));
    // Of what is used elsewhere, too: the gradient from there is lost.
    is_wrong("upsample_nearest1d", &[1, 2, 3], |x| Tensor::cat(&[x, &x.upsample_nearest1d(6)?], 2));
    is_wrong("upsample_nearest2d", &[1, 2, 3, 4], |x| {
        Tensor::cat(&[x, &x.upsample_nearest2d(3, 4)?], 2)
    });
    is_right("upsample_nearest1d of a copy", &[1, 2, 3], |x| {
        Tensor::cat(&[x, &x.copy()?.upsample_nearest1d(6)?], 2)
    });
    is_right("upsample_nearest2d of a copy", &[1, 2, 3, 4], |x| {
        Tensor::cat(&[x, &x.copy()?.upsample_nearest2d(3, 4)?], 2)
    });
    has_none("upsample_nearest1d", &[1, 2, 3], |x| x.upsample_nearest1d(4));
    has_none("upsample_nearest2d", &[1, 2, 3, 4], |x| x.upsample_nearest2d(6, 4));
    has_none("upsample_bilinear2d", &[1, 2, 3, 4], |x| x.upsample_bilinear2d(6, 8, false));
    is_right("upsampling by broadcasting", &[1, 2, 3, 4], |x| {
        let (n, c, h, w) = x.dims4()?;
        let wide = x.reshape(&[n, c, h, 1, w, 1][..])?.broadcast_as(&[n, c, h, 2, w, 3][..])?;
        wide.reshape((n, c, h * 2, w * 3))
    });
}

#[test]
fn scattering() -> Result<()> {
    let (dims, cpu) = ([3, 4], &Device::Cpu);
    let indexes = Tensor::new(&[[2u32, 0, 2, 1]], cpu)?;
    let twice = Tensor::new(&[[2u32, 0, 2, 1], [2, 1, 0, 1], [0, 2, 1, 0]], cpu)?;
    let source = random(&[1, 4], DType::F64, 5)?;
    let zeros = Tensor::zeros(&dims, DType::F64, cpu)?;
    is_wrong("scatter into x", &dims, |x| x.scatter(&indexes, &source, 0));
    let as_large = random(&dims, DType::F64, 6)?;
    is_wrong("scatter_add to x", &dims, |x| x.scatter_add(&twice, &as_large, 0));
    let error = slopes(&dims, |x| x.scatter_add(&indexes, &source, 0)).expect_err("none");
    assert!(error.to_string().contains("shape mismatch in scatter"), "{error}");
    is_wrong("scatter to one place twice", &dims, |x| zeros.scatter(&twice, x, 0));
    is_right("scatter of x", &[1, 4], |x| zeros.scatter(&indexes, x, 0));
    is_right("scatter_add of x", &dims, |x| zeros.scatter_add(&twice, x, 0));
    let written = Tensor::zeros(&dims, DType::U8, cpu)?;
    let written = written.scatter(&indexes, &Tensor::ones((1, 4), DType::U8, cpu)?, 0)?;
    is_right("where_cond of what is scattered", &dims, |x| {
        written.where_cond(&zeros.scatter(&indexes, &source, 0)?, x)
    });
    is_right("a sum with what is scattered", &dims, |x| {
        x + zeros.scatter_add(&indexes, &source, 0)?
    });
    is_right("index_add", &dims, |x| x.index_add(&Tensor::new(&[1u32], cpu)?, &source, 0));
    is_right("slice_scatter", &dims, |x| x.slice_scatter(&source, 0, 1));
    Ok(())
}

#[test]
fn transposed_convolutions_of_sequences() -> Result<()> {
    let weight = random(&[2, 3, 3], DType::F64, 6)?;
    has_none("conv_transpose1d", &[1, 2, 5], |x| x.conv_transpose1d(&weight, 0, 0, 1, 1, 1));
    Ok(())
}
