//! What a token sees, and which tokens are refused.

use candle_core::{Device, Result, Tensor};

use super::{ids, new_model, styles, tiny};

#[test]
fn a_token_sees_only_what_precedes_it() -> Result<()> {
    for config in [true, false].into_iter().flat_map(styles) {
        let (model, _) = new_model(&config, 1)?;
        let logits = |last: u32| -> Result<Vec<Vec<f32>>> {
            let ids = Tensor::new(&[[1u32, 2, 3, last]], &Device::Cpu)?;
            model.forward(&ids, false)?.squeeze(0)?.to_vec2()
        };
        let (a, b) = (logits(4)?, logits(5)?);
        assert_eq!(a[..3], b[..3]);
        assert_ne!(a[3], b[3]);
    }
    Ok(())
}

#[test]
fn ids_that_do_not_fit_are_refused() -> Result<()> {
    let (model, _) = new_model(&tiny(), 1)?;
    let error = model.forward(&ids(1, 13, 0)?, false).unwrap_err().to_string();
    assert!(error.contains("0 cached + T <= max_position_embeddings = 12, got [1, 13]"), "{error}");
    assert!(model.forward(&Tensor::new(&[1u32, 2], &Device::Cpu)?, false).is_err());
    assert!(model.forward(&Tensor::new(&[[17u32]], &Device::Cpu)?, false).is_err());
    Ok(())
}
