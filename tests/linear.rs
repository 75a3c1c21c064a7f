//! `linear` against candle's chain of `matmul` and `broadcast_add` in f64, and what it refuses.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::linear;
use cases::{bits, random};

type Forward = dyn Fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>;

/// `y` and the gradients of all arguments, given dy.
fn results(
    forward: impl Fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>,
    [x, weight, dy]: [&Tensor; 3],
    bias: Option<&Tensor>,
) -> Result<Vec<Tensor>> {
    let [x, weight] = [Var::from_tensor(x)?, Var::from_tensor(weight)?];
    let bias = bias.map(Var::from_tensor).transpose()?;
    let y = forward(&x, &weight, bias.as_ref().map(Var::as_tensor))?;
    let grads = (&y * dy)?.backward()?;
    let vars = [Some(&x), Some(&weight), bias.as_ref()];
    let gradient = |var: &Var| grads.get(var).expect("a gradient for each argument").clone();
    Ok([y].into_iter().chain(vars.into_iter().flatten().map(gradient)).collect())
}

fn chain(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_matmul(weight)?;
    bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}

/// Sums of `n` products of numbers below 2, and of their gradients: `n` units in the last place of 4.
fn assert_agrees(ours: &[Tensor], exact: &[Tensor], n: usize, what: &str) -> Result<()> {
    assert_eq!(ours.len(), exact.len(), "{what}");
    for (at, (ours, exact)) in ours.iter().zip(exact).enumerate() {
        assert_eq!(ours.dims(), exact.dims(), "{what}, result {at}");
        let unit = match ours.dtype() {
            DType::F64 => 2f64.powi(-53),
            DType::F32 => 2f64.powi(-24),
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        let off = (ours.to_dtype(DType::F64)? - exact)?.abs()?.flatten_all()?.to_vec1::<f64>()?;
        let off = off.into_iter().fold(0., f64::max);
        let size = exact.abs()?.flatten_all()?.to_vec1::<f64>()?.into_iter().fold(1., f64::max);
        // Products of halves are summed in f32 and rounded once, a biased one twice.
        let roundings = if unit > 1e-5 { 2. } else { n as f64 };
        assert!(off <= roundings * unit * size.max(4.), "{what}, result {at}: off by {off}");
    }
    Ok(())
}

#[test]
fn output_and_gradients_are_those_of_the_chain() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for (leading, inputs, outputs) in [
            (vec![1], 1, 1),
            (vec![3, 5], 7, 2),
            (vec![2, 3, 4], 33, 65),
            (vec![300], 16, 130),
            (vec![4099], 3, 5),
        ] {
            let x = random(&[leading.clone(), vec![inputs]].concat(), dtype, 1)?;
            let weight = random(&[inputs, outputs], dtype, 2)?;
            let dy = random(&[leading.clone(), vec![outputs]].concat(), dtype, 3)?;
            let bias = random(&[outputs], dtype, 4)?;
            for bias in [None, Some(&bias)] {
                let ours = results(linear, [&x, &weight, &dy], bias)?;
                let [x, weight, dy] = [&x, &weight, &dy].map(|x| x.to_dtype(DType::F64).unwrap());
                let bias = bias.map(|bias| bias.to_dtype(DType::F64)).transpose()?;
                let exact = results(chain, [&x, &weight, &dy], bias.as_ref())?;
                let n = inputs.max(outputs).max(leading.iter().product());
                let what = format!("{dtype:?} {leading:?} {inputs} {outputs} {}", bias.is_some());
                assert_agrees(&ours, &exact, n, &what)?;
            }
        }
    }
    Ok(())
}

#[test]
fn transposed_weights_and_strided_inputs_need_no_copy_by_the_caller() -> Result<()> {
    let x = Var::from_tensor(&random(&[6, 4, 3], DType::F64, 1)?)?;
    let weight = Var::from_tensor(&random(&[5, 6], DType::F64, 2)?)?;
    let dy = random(&[3, 4, 5], DType::F64, 3)?;
    let run = |forward: &Forward| {
        let y = forward(&x.transpose(0, 2)?, &weight.t()?, None)?;
        let grads = (&y * &dy)?.backward()?;
        let of = |var: &Var| grads.get(var).expect("a gradient").contiguous();
        Ok::<_, candle_core::Error>(vec![y, of(&x)?, of(&weight)?])
    };
    let chain =
        |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>| chain(&x.contiguous()?, weight, bias);
    assert_agrees(&run(&linear)?, &run(&chain)?, 12, "strided")?;

    let columns = random(&[6, 9], DType::F64, 4)?.narrow(1, 2, 5)?;
    let x = random(&[2, 6], DType::F64, 5)?;
    let y = linear(&x, &columns, None)?;
    assert_agrees(&[y], &[x.matmul(&columns.contiguous()?)?], 6, "columns of a matrix")
}

#[test]
fn only_what_is_tracked_gets_a_gradient_and_twice_if_asked() -> Result<()> {
    let x = random(&[3, 4], DType::F32, 1)?;
    let weight = Var::from_tensor(&random(&[4, 2], DType::F32, 2)?)?;
    let y = linear(&x, &weight, None)?;
    let [first, second] = [y.backward()?, y.backward()?];
    let [first, second] =
        [first, second].map(|grads| grads.get(&weight).expect("a gradient").clone());
    assert_eq!(bits(&first)?, bits(&second)?);
    assert_eq!(first.to_vec2::<f32>()?[0][0], x.sum(0)?.to_vec1::<f32>()?[0]);
    Ok(())
}

#[test]
fn nothing_is_multiplied_by_nothing() -> Result<()> {
    let x = Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?;
    let weight = random(&[4, 2], DType::F32, 2)?;
    let bias = random(&[2], DType::F32, 3)?;
    assert_eq!(linear(&x, &weight, Some(&bias))?.dims(), [0, 2]);
    // And no columns give the bias alone.
    let (x, weight) = (x.reshape((4, 0))?, Tensor::zeros((0, 2), DType::F32, &Device::Cpu)?);
    let y = linear(&x, &weight, Some(&bias))?;
    assert_eq!(y.to_vec2::<f32>()?, vec![bias.to_vec1::<f32>()?; 4]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let x = random(&[3, 4], DType::F32, 1)?;
    let weight = random(&[4, 2], DType::F32, 2)?;
    let bias = random(&[2], DType::F32, 3)?;
    let error = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>| {
        linear(x, weight, bias).unwrap_err().to_string()
    };
    let transposed = error(&x, &weight.t()?, None);
    assert!(transposed.contains("linear: x: expected [.., 2]"), "{transposed}");
    let matrix = error(&x, &bias, None);
    assert!(matrix.contains("linear: weight: expected a matrix [in, out]"), "{matrix}");
    let shape = error(&x, &weight, Some(&x));
    assert!(shape.contains("linear: bias: expected shape [2]"), "{shape}");
    let dtype = error(&x, &weight.to_dtype(DType::F64)?, None);
    assert!(dtype.contains("linear: weight: expected dtype F32"), "{dtype}");
    let ids = error(&x.to_dtype(DType::U32)?, &weight, None);
    assert!(ids.contains("linear: x: expected dtype"), "{ids}");
    let scalar = error(&Tensor::new(1f32, &Device::Cpu)?, &weight, None);
    assert!(scalar.contains("linear: x: expected [.., 4]"), "{scalar}");
    Ok(())
}

#[test]
fn without_rows_or_columns_the_bias_alone_counts_and_every_argument_has_a_gradient() -> Result<()> {
    for (rows, inputs) in [(0, 2), (2, 0), (0, 0)] {
        let var = |dims: &[usize]| Var::ones(dims, DType::F32, &Device::Cpu);
        let (x, weight, bias) = (var(&[rows, inputs])?, var(&[inputs, 3])?, var(&[3])?);
        let y = linear(&x, &weight, Some(&bias))?;
        assert_eq!(y.to_vec2::<f32>()?, vec![vec![1.; 3]; rows]);
        let grads = y.backward()?;
        let of = |var: &Var| grads.get(var).unwrap().flatten_all()?.to_vec1::<f32>();
        assert_eq!(of(&bias)?, [rows as f32; 3]);
        for (var, name) in [(&x, "x"), (&weight, "weight")] {
            assert_eq!(
                of(var)?,
                vec![0.; var.elem_count()],
                "{name} of {rows} rows, {inputs} inputs"
            );
        }
    }
    Ok(())
}

/// More rows than the sums of a weight's gradient are taken over at once, and fewer; sizes of no tile.
#[test]
fn the_number_of_threads_changes_no_bit() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for (rows, inputs, outputs) in
            [(4099, 33, 65), (6145, 7, 129), (4095, 5, 9), (300, 257, 130)]
        {
            let x = random(&[rows, inputs], dtype, 1)?;
            let weight = random(&[inputs, outputs], dtype, 2)?;
            let dy = random(&[rows, outputs], dtype, 3)?;
            let bias = random(&[outputs], dtype, 4)?;
            let of = |threads: usize| -> Result<Vec<Vec<u64>>> {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let results = results(linear, [&x, &weight, &dy], Some(&bias))?;
                    results.iter().map(bits).collect()
                })
            };
            let one = of(1)?;
            for threads in [2, 3, 8] {
                assert!(of(threads)? == one, "{dtype:?} {rows} {inputs} {outputs}: {threads}");
            }
        }
    }
    Ok(())
}
