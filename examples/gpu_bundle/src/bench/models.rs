//! Where ops meet: a residual branch under stochastic depth, and a training step.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::Bench;
use crate::candle_gpt::MatrixProducts;
use crate::kept;
use crate::results::Record;
use crate::step::{FORMS, Form, Step, check_agree, size};

/// Without dropout and with it.
const DROP_PS: [f32; 2] = [0., 0.1];

fn dtypes(device: &Device) -> Vec<DType> {
    if device.is_cuda() { vec![DType::F32, DType::BF16] } else { vec![DType::F32] }
}

impl Bench<'_> {
    /// Stochastic depth around an MLP: the kept samples computed alone, or all of them and then masked.
    pub fn kept(&mut self, small: bool) -> Result<()> {
        let device = self.timer.device.clone();
        for dtype in dtypes(&device) {
            let branch = kept::Branch::new(dtype, small, &device)?;
            for drop_p in kept::DROP_PS {
                branch.check(drop_p, if dtype == DType::F32 { 1e-5 } else { 1e-2 })?;
                for form in kept::FORMS {
                    let [library, variant] = form.names();
                    let op =
                        if form == kept::Form::Masked { "masked_mlp" } else { "drop_path_kept" };
                    for pass in ["forward", "forward_backward"] {
                        let time = || match pass {
                            "forward" => {
                                self.timer.time(1, |_| branch.forward(form, drop_p).map(|_| ()))
                            }
                            _ => self
                                .timer
                                .time(1, |_| branch.forward(form, drop_p)?.backward().map(|_| ())),
                        };
                        let what = [library, variant, op, pass, dtype.as_str()];
                        let mut record = Record::new(what, drop_p, branch.dims(), time()?);
                        record.again_ms = Some(time()?.ms);
                        self.add(record)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The training step of the GPT in every form, and its matrix products alone.
    pub fn steps(&mut self, small: bool) -> Result<()> {
        let device = self.timer.device.clone();
        let size = size(small, &device);
        for drop_p in DROP_PS {
            let new = |form| Step::new(form, &size, drop_p, DType::F32, &device);
            check_agree("fused GPT", &new(Form::Fused)?, &new(Form::Unfused)?, 1e-3)?;
            if drop_p == 0. {
                check_agree("candle's GPT", &new(Form::Candle)?, &new(Form::Unfused)?, 1e-3)?;
            }
        }
        let (config, batch) = &size;
        let dims =
            [*batch, config.max_position_embeddings, config.hidden_size, config.num_hidden_layers];
        for dtype in dtypes(&device) {
            let like = Tensor::zeros(1, DType::F32, &device)?;
            let products = MatrixProducts::new(config, *batch, dtype, &like)?;
            let timing = self.timer.time(1, |_| products.run())?;
            let what =
                ["candle", "matrix products alone", "gpt_step", "training_step", dtype.as_str()];
            let mut record = Record::new(what, 0., &dims, timing);
            record.flop = Some(products.flop());
            self.add(record)?;
            for drop_p in DROP_PS {
                for form in FORMS {
                    let mut step = Step::new(form, &size, drop_p, dtype, &device)?;
                    let timing = self.timer.time(1, |_| step.run())?;
                    let loss = step.loss()?.to_scalar::<f32>()?;
                    ensure!(loss.is_finite(), "the loss of {form:?} in {dtype:?} is {loss}");
                    let [library, variant] = form.names();
                    let what = [library, variant, "gpt_step", "training_step", dtype.as_str()];
                    let mut record = Record::new(what, drop_p, &dims, timing);
                    record.again_ms = Some(self.timer.time(1, |_| step.run())?.ms);
                    self.add(record)?;
                }
            }
        }
        Ok(())
    }
}
