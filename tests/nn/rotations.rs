//! `rope`, `rope_i` and `rope_thd` rotate as candle's do, with gradients.

use candle_core::{DType, IndexOp, Result, Tensor};
use candle_dropout::nn;
use cases::{DTYPES, View, epsilon, error, random};

use crate::agrees::{Call, VIEWS, agrees};
use crate::fails;

/// Tables of `positions`, [positions, d / 2], in the dtype of x.
fn tables(x: &Tensor, positions: usize, d: usize) -> Result<[Tensor; 2]> {
    let angles = random(&[positions, d / 2], DType::F64, 5)?;
    let [cos, sin] = [angles.cos()?, angles.sin()?];
    // Halves round the tables; the reference is to have the same ones.
    let rounded = |table: Tensor| table.to_dtype(DType::BF16)?.to_dtype(x.dtype());
    Ok([rounded(cos)?, rounded(sin)?])
}

/// A function of x [B, H, T, D] and tables [T', D/2].
type Rotation = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

/// A rotation with tables [B, T', D/2] of candle's for one.
fn each_batch(rotation: Rotation, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let parts = (0..x.dim(0)?).map(|b| rotation(&x.i(b..b + 1)?, &cos.get(b)?, &sin.get(b)?));
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
}

fn thd_slow(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let x = x.transpose(1, 2)?.contiguous()?;
    candle_nn::rotary_emb::rope_slow(&x, cos, sin)?.transpose(1, 2)?.contiguous()
}

const ROTATIONS: [(&str, Rotation, Rotation, Rotation); 3] = [
    ("rope", nn::rotary_emb::rope, candle_nn::rotary_emb::rope_slow, candle_nn::rotary_emb::rope),
    (
        "rope_i",
        nn::rotary_emb::rope_i,
        candle_nn::rotary_emb::rope_i_slow,
        candle_nn::rotary_emb::rope_i,
    ),
    ("rope_thd", nn::rotary_emb::rope_thd, thd_slow, candle_nn::rotary_emb::rope_thd),
];

pub fn rotations_agree(dims: [usize; 4], more: usize, (view, dtype): (View, DType)) -> Result<()> {
    for (name, ours, slow, fast) in ROTATIONS {
        let t = if name == "rope_thd" { dims[1] } else { dims[2] };
        let (positions, d) = (t + more, dims[3]);
        let of = |rotation: Rotation| {
            move |x: &[Tensor]| {
                let [cos, sin] = tables(&x[0], positions, d)?;
                rotation(&x[0], &cos, &sin)
            }
        };
        agrees(name, &[dims.to_vec()], (view, dtype), 1, &of(ours), &of(slow))?;
        let x = random(&dims, dtype, 1)?;
        let [cos, sin] = tables(&x, positions, d)?;
        let (y, fast_y) = (ours(&x, &cos, &sin)?, fast(&x, &cos, &sin)?);
        let off = error(&y.to_dtype(DType::F64)?, &fast_y.to_dtype(DType::F64)?)?;
        assert!(off <= 4. * 3. * epsilon(dtype), "{name}: {off} from candle's kernel"); // |y| < 3, three roundings
        // Tables of each batch entry: the shared ones, the first turned the other way.
        let batch = |table: &Tensor, first: f64| -> Result<Tensor> {
            let mut tables = vec![(table * first)?];
            tables.resize(dims[0], table.clone());
            Tensor::stack(&tables, 0)
        };
        let per_batch = |rotation: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
                         x: &[Tensor]| {
            let [cos, sin] = tables(&x[0], positions, d)?;
            rotation(&x[0], &batch(&cos, 1.)?, &batch(&sin, -1.)?)
        };
        let (a, b): (&Call, &Call) = (&|x| per_batch(&ours, x), &|x| {
            per_batch(&|x, cos, sin| each_batch(slow, x, cos, sin), x)
        });
        agrees(&format!("{name} each batch"), &[dims.to_vec()], (view, dtype), 1, a, b)?;
    }
    Ok(())
}

#[test]
fn rotations() -> Result<()> {
    for dims in [[1, 1, 1, 2], [2, 3, 5, 4], [1, 2, 7, 16], [2, 5, 3, 10]] {
        for more in [0, 3] {
            for dtype in DTYPES {
                for view in VIEWS {
                    rotations_agree(dims, more, (view, dtype))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn tables_that_are_learnt_get_a_gradient() -> Result<()> {
    for (name, ours, slow, _) in ROTATIONS {
        let t = 3;
        let args = [vec![2, t, t, 8], vec![t, 4], vec![t, 4]];
        let (a, b): (&Call, &Call) =
            (&|x| ours(&x[0], &x[1], &x[2]), &|x| slow(&x[0], &x[1], &x[2]));
        for dtype in DTYPES {
            agrees(name, &args, (View::Contiguous, dtype), 2 * 3 * 4, a, b)?;
        }
    }
    Ok(())
}

#[test]
fn rotations_say_what_does_not_fit() -> Result<()> {
    let x = random(&[2, 3, 5, 8], DType::F32, 1)?;
    let table = |dims: &[usize]| random(dims, DType::F32, 2);
    let good = table(&[5, 4])?;
    let got =
        ["rope_i: cos: expected shape [T, D/2] = [5, 4] or [B, T, D/2] = [2, 5, 4]", "got [4, 4]"];
    fails(nn::rotary_emb::rope_i(&x, &table(&[4, 4])?, &good), &got);
    fails(
        nn::rotary_emb::rope(&x, &good, &table(&[5, 8])?),
        &["rope: sin: expected", "got [5, 8]"],
    );
    fails(nn::rotary_emb::rope(&x, &table(&[3, 5, 4])?, &good), &["got [3, 5, 4]"]);
    let got = ["rope_thd: cos: expected shape [T, D/2] = [3, 4]", "got [2, 4]"];
    fails(nn::rotary_emb::rope_thd(&x, &table(&[2, 4])?, &good), &got);
    fails(
        nn::rotary_emb::rope_thd(&x.get(0)?, &good, &good),
        &["rope_thd: xs: expected [B, T, H, D]"],
    );
    fails(nn::rotary_emb::rope(&x.get(0)?, &good, &good), &["rope: xs: expected [B, H, T, D]"]);
    fails(
        nn::rotary_emb::rope(&x.i((.., .., .., ..7))?, &good, &good),
        &["rope: xs: expected an even last"],
    );
    Ok(())
}
