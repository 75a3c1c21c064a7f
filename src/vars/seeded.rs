//! Weights drawn from a seed.
//!
//! Candle's CPU generator cannot be seeded, and its other generators hand out numbers in the order
//! in which parameters happen to be created. Here every parameter owns a stream of its own, chosen
//! by (seed, parameter name): two models built from one seed start from equal weights on every
//! device, in whatever order they create them, and adding a layer changes no other layer's weights.

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use rand::RngCore;
use rand_distr::{Distribution, StandardNormal, StandardUniform};

use super::lock;

/// A [`VarBuilder`] that creates trainable variables in `vars`, each drawn from (`seed`, its full
/// name).
///
/// A variable that is already in `vars` is returned as it is, so loaded or trained weights survive.
/// Numbers are drawn on the host in f64, then rounded to the dtype and moved to the device: the
/// weights do not depend on either beyond that rounding.
///
/// # Errors
/// `get` fails if a variable of that name exists with another shape, and if a distribution is
/// impossible (a standard deviation that is negative or not finite, an empty uniform interval).
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Result};
/// use candle_dropout::seeded_var_builder;
/// use candle_nn::VarMap;
///
/// # fn main() -> Result<()> {
/// let weight = |seed| {
///     let vars = VarMap::new();
///     let vb = seeded_var_builder(&vars, seed, DType::F32, &Device::Cpu);
///     candle_nn::linear(3, 2, vb.pp("head"))?.weight().to_vec2::<f32>()
/// };
/// assert_eq!(weight(7)?, weight(7)?);
/// assert_ne!(weight(7)?, weight(8)?);
/// # Ok(()) }
/// ```
pub fn seeded_var_builder(
    vars: &VarMap,
    seed: u64,
    dtype: DType,
    device: &Device,
) -> VarBuilder<'static> {
    let backend = SeededInit { vars: vars.clone(), seed };
    VarBuilder::from_backend(Box::new(backend), dtype, device.clone())
}

struct SeededInit {
    vars: VarMap,
    seed: u64,
}

impl SeededInit {
    fn existing(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(lock(&self.vars, "init")?.get(name).map(|var| var.as_tensor().clone()))
    }
}

impl SimpleBackend for SeededInit {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if let Some(tensor) = self.existing(name)? {
            if tensor.shape() != &shape {
                bail!(
                    "init: {name}: expected shape {shape:?}, the variable map holds {:?}",
                    tensor.shape()
                )
            }
            return Ok(tensor);
        }
        let values = draw(&shape, name, init, self.seed)?;
        let values =
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?;
        let var = Var::from_tensor(&values)?;
        // Two threads may have drawn the same variable: the first one in stays.
        let mut vars = lock(&self.vars, "init")?;
        Ok(vars.entry(name.to_string()).or_insert(var).as_tensor().clone())
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        match self.existing(name)? {
            Some(tensor) => Ok(tensor),
            None => {
                bail!("init: {name} does not exist yet and has no shape: call `get` with a shape")
            }
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vars.data().lock().is_ok_and(|vars| vars.contains_key(name))
    }
}

fn draw(shape: &Shape, name: &str, init: Init, seed: u64) -> Result<Vec<f64>> {
    let rng = SplitMix64::for_parameter(seed, name);
    let count = shape.elem_count();
    match init {
        Init::Const(value) => Ok(vec![value; count]),
        Init::Randn { mean, stdev } => normal(rng, mean, stdev, name, count),
        Init::Uniform { lo, up } => uniform(rng, lo, up, name, count),
        Init::Kaiming { dist, fan, non_linearity } => {
            let stdev = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                NormalOrUniform::Normal => normal(rng, 0.0, stdev, name, count),
                NormalOrUniform::Uniform => {
                    uniform(rng, -3f64.sqrt() * stdev, 3f64.sqrt() * stdev, name, count)
                }
            }
        }
    }
}

fn normal(
    mut rng: SplitMix64,
    mean: f64,
    stdev: f64,
    name: &str,
    count: usize,
) -> Result<Vec<f64>> {
    if !(stdev.is_finite() && stdev >= 0.0) {
        bail!("init: {name}: expected a finite standard deviation of at least 0, got {stdev}")
    }
    let mut sample = || -> f64 { StandardNormal.sample(&mut rng) };
    Ok((0..count).map(|_| mean + stdev * sample()).collect())
}

fn uniform(mut rng: SplitMix64, lo: f64, up: f64, name: &str, count: usize) -> Result<Vec<f64>> {
    if !(lo.is_finite() && up.is_finite() && lo <= up) {
        bail!("init: {name}: expected finite uniform bounds lo <= up, got lo {lo}, up {up}")
    }
    let mut sample = || -> f64 { StandardUniform.sample(&mut rng) };
    Ok((0..count).map(|_| lo + (up - lo) * sample()).collect())
}

/// SplitMix64 (Steele, Lea, Flood 2014): rand's own generators may change between its releases,
/// weights must not.
struct SplitMix64(u64);

impl SplitMix64 {
    fn for_parameter(seed: u64, name: &str) -> Self {
        // FNV-1a over the name, then one step of the generator so that neighbouring seeds share no
        // stretch of a stream.
        let name = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Self(Self(seed).next_u64() ^ name)
    }
}

impl RngCore for SplitMix64 {
    fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn next_u32(&mut self) -> u32 {
        (self.next_u64() >> 32) as u32
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_nn::init::{FanInOut, NonLinearity};

    fn weights(seed: u64, name: &str, init: Init) -> Result<Vec<f64>> {
        let vb = seeded_var_builder(&VarMap::new(), seed, DType::F64, &Device::Cpu);
        vb.get_with_hints((100, 400), name, init)?.flatten_all()?.to_vec1()
    }

    const NORMAL: Init = Init::Randn { mean: 0.5, stdev: 2.0 };

    fn mean_and_stdev(values: &[f64]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        (mean, (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt())
    }

    #[test]
    fn weights_depend_on_seed_and_name_only() -> Result<()> {
        assert_eq!(weights(1, "a", NORMAL)?, weights(1, "a", NORMAL)?);
        assert_ne!(weights(1, "a", NORMAL)?, weights(2, "a", NORMAL)?);
        assert_ne!(weights(1, "a", NORMAL)?, weights(1, "b", NORMAL)?);

        let build = |names: [&str; 2]| -> Result<Vec<f32>> {
            let vb = seeded_var_builder(&VarMap::new(), 1, DType::F32, &Device::Cpu);
            for name in names {
                vb.get_with_hints(8, name, NORMAL)?;
            }
            vb.get(8, "a")?.to_vec1()
        };
        assert_eq!(build(["a", "b"])?, build(["b", "a"])?);
        Ok(())
    }

    #[test]
    fn streams_of_seeds_and_names_are_uncorrelated() -> Result<()> {
        let unit = Init::Randn { mean: 0.0, stdev: 1.0 };
        let a = weights(1, "a", unit)?;
        for other in [weights(2, "a", unit)?, weights(1, "b", unit)?, weights(0, "a", unit)?] {
            let r = a.iter().zip(&other).map(|(x, y)| x * y).sum::<f64>() / a.len() as f64;
            assert!(r.abs() < 4.0 / (a.len() as f64).sqrt(), "correlation {r}");
        }
        Ok(())
    }

    #[test]
    fn every_init_is_honoured() -> Result<()> {
        assert!(weights(1, "a", Init::Const(0.25))?.iter().all(|&v| v == 0.25));
        assert!(weights(1, "a", Init::default())?.iter().all(|&v| v == 0.0));

        // 40,000 draws: the mean lies within 4 standard errors, the spread within 2 %.
        let (mean, stdev) = mean_and_stdev(&weights(1, "a", NORMAL)?);
        assert!(
            (mean - 0.5).abs() < 4.0 * 2.0 / 200.0 && (stdev / 2.0 - 1.0).abs() < 0.02,
            "{mean} {stdev}"
        );

        let uniform = weights(1, "a", Init::Uniform { lo: -1.0, up: 3.0 })?;
        let (mean, stdev) = mean_and_stdev(&uniform);
        assert!(uniform.iter().all(|v| (-1.0..3.0).contains(v)));
        assert!(
            (mean - 1.0).abs() < 0.03 && (stdev / (4.0 / 12f64.sqrt()) - 1.0).abs() < 0.02,
            "{mean} {stdev}"
        );

        for (fan, features) in [(FanInOut::FanIn, 400.0), (FanInOut::FanOut, 100.0)] {
            for dist in [NormalOrUniform::Normal, NormalOrUniform::Uniform] {
                let init = Init::Kaiming { dist, fan, non_linearity: NonLinearity::ReLU };
                let (mean, stdev) = mean_and_stdev(&weights(1, "a", init)?);
                let expected = (2f64 / features).sqrt();
                assert!(mean.abs() < 4.0 * expected / 200.0, "{dist:?} {fan:?}: mean {mean}");
                assert!(
                    (stdev / expected - 1.0).abs() < 0.02,
                    "{dist:?} {fan:?}: {stdev}, not {expected}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn weights_of_a_seed_are_pinned() -> Result<()> {
        // A changed number here means that every published run of this crate starts from other
        // weights.
        let values = weights(1, "a", Init::Randn { mean: 0.0, stdev: 1.0 })?;
        assert_eq!(&values[..3], &[-1.0760574787985835, 0.19875374777658042, 0.751950989111808]);
        Ok(())
    }

    #[test]
    fn an_existing_variable_is_returned_and_its_shape_checked() -> Result<()> {
        let vars = VarMap::new();
        let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
        let made = vb.get_with_hints(3, "a", NORMAL)?;
        assert!(made.is_variable());
        assert_eq!(vb.get(3, "a")?.to_vec1::<f32>()?, made.to_vec1::<f32>()?);
        assert_eq!(vb.get_unchecked("a")?.id(), made.id());
        assert!(vb.contains_tensor("a") && !vb.contains_tensor("b"));
        assert!(vb.get(4, "a").unwrap_err().to_string().contains("init: a: expected shape [4]"));
        assert!(vb.get_unchecked("b").unwrap_err().to_string().contains("call `get` with a shape"));
        Ok(())
    }

    #[test]
    fn impossible_distributions_are_refused() {
        for init in [Init::Randn { mean: 0.0, stdev: -1.0 }, Init::Uniform { lo: 1.0, up: 0.0 }] {
            assert!(
                weights(1, "a", init).unwrap_err().to_string().starts_with("init: a: expected")
            );
        }
    }
}
