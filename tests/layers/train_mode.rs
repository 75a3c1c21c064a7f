//! The switch that layers share.

use candle_core::{DType, Module, Result};
use candle_dropout::{DropPath, Dropout, TrainMode};
use cases::{bits, random};

use super::generator;

#[test]
fn evaluation_under_a_switch_draws_no_key_and_ends_with_its_guard() -> Result<()> {
    let (mode, keys) = (TrainMode::new(), generator(3));
    let x = random(&[8, 64], DType::F32, 1)?;
    let dropout = Dropout::with_generator(0.5, keys.clone())?.switched(&mode);
    let path = DropPath::new(0.5, keys.clone())?.switched(&mode);
    let layers: [&dyn Module; 2] = [&dropout, &path];
    let drawn = || -> Result<u64> {
        let before = keys.state().counter;
        for layer in layers {
            layer.forward(&x)?;
        }
        Ok(keys.state().counter - before)
    };
    assert_eq!(drawn()?, 2);
    {
        let _guard = mode.eval();
        assert_eq!(drawn()?, 0);
        for layer in layers {
            assert_eq!(bits(&layer.forward(&x)?)?, bits(&x)?);
        }
        {
            let _inner = mode.clone().eval();
            assert_eq!(drawn()?, 0);
        }
        assert_eq!(drawn()?, 0, "the outer guard lives");
    }
    assert_eq!(drawn()?, 2);
    assert_eq!(mode.evaluate(drawn)?, 0);
    assert_eq!(drawn()?, 2);
    let fails: Result<()> = mode.evaluate(|| candle_core::bail!("early"));
    assert!(fails.is_err());
    assert_eq!(drawn()?, 2);
    Ok(())
}

#[test]
fn a_panic_takes_the_guard_with_it() {
    let mode = TrainMode::new();
    let of_panic = std::panic::catch_unwind(|| {
        let _guard = mode.eval();
        assert!(!mode.is_training());
        std::panic::panic_any("on purpose");
    });
    assert!(of_panic.is_err() && mode.is_training());
    let thread = mode.clone();
    let joined =
        std::thread::spawn(move || thread.evaluate(|| std::panic::panic_any("on purpose"))).join();
    assert!(joined.is_err() && mode.is_training());
}

#[test]
fn a_model_evaluates_until_the_last_of_two_threads_has_done_so() -> Result<()> {
    let (mode, keys) = (TrainMode::new(), generator(3));
    let layer = Dropout::with_generator(0.5, keys.clone())?.switched(&mode);
    let x = random(&[8, 64], DType::F32, 1)?;
    let meeting = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|turn| {
            let (mode, layer, x, meeting) = (&mode, &layer, &x, &meeting);
            scope.spawn(move || -> Result<()> {
                for step in 0..200 {
                    let guard = mode.eval();
                    meeting.wait(); // both evaluate
                    assert_eq!(bits(&layer.forward(x)?)?, bits(x)?);
                    meeting.wait(); // one goes on alone
                    if step % 2 == turn {
                        drop(guard);
                        meeting.wait();
                        meeting.wait();
                    } else {
                        meeting.wait();
                        assert_eq!(bits(&layer.forward(x)?)?, bits(x)?);
                        meeting.wait();
                        drop(guard);
                    }
                }
                Ok(())
            })
        });
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })?;
    assert_eq!(keys.state().counter, 0, "no evaluation drew a key");
    assert!(mode.is_training());
    assert_ne!(bits(&layer.forward(&x)?)?, bits(&x)?);
    Ok(())
}

#[test]
fn two_switches_know_nothing_of_one_another() {
    let (one, other) = (TrainMode::new(), TrainMode::new());
    let _guard = one.eval();
    assert!(!one.is_training() && other.is_training());
}
