//! The example `concrete_dropout`: what it shows, and that it shows it again.

#[path = "../concrete_dropout/model.rs"]
mod model;

use candle_core::Result;
use model::learnt;

/// The mean rate of the layers with many inputs: one input alone has little to say about its rate.
fn hidden_drop_p(n: usize, seed: u64) -> Result<f32> {
    let (drop_ps, _) = learnt(n, 1500, seed)?;
    Ok((drop_ps[1] + drop_ps[2]) / 2.)
}

/// From 0.1 the rate rises to the 1/2 of the prior where there is little data, and falls where there is much.
#[test]
fn the_rate_falls_as_data_grows() -> Result<()> {
    for seed in [1, 2] {
        let [few, some, many] = [10, 100, 1000].map(|n| hidden_drop_p(n, seed));
        let (few, some, many) = (few?, some?, many?);
        println!("seed {seed}: {few:.3}, {some:.3}, {many:.3}");
        assert!(few > 0.4 && (0.1..0.38).contains(&some) && many < 0.03, "{few}, {some}, {many}");
    }
    Ok(())
}

#[test]
fn a_seed_learns_the_same_again() -> Result<()> {
    assert_eq!(learnt(100, 50, 7)?, learnt(100, 50, 7)?);
    Ok(())
}
