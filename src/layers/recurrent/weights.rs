use candle_core::{Result, Tensor, bail};
use candle_nn::rnn::Direction;
use candle_nn::{Init, VarBuilder};

use super::super::site::name_at;
use super::masks::RecurrentMasks;
use super::unstack::unstack;
use crate::check::{check_alike, check_dtype};
use crate::functional::linear_out_in;

/// The four variables of a recurrent layer under candle-nn's names, and what is done with them whatever the gates.
#[derive(Clone, Debug)]
pub(super) struct Weights {
    /// The layer and, where it has one, the path of its variables: for errors.
    pub(super) name: String,
    op: &'static str,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Option<Tensor>,
    b_hh: Option<Tensor>,
    in_dim: usize,
    hidden_dim: usize,
}

/// How variables are drawn: weights, then biases.
pub(super) type Inits = ([Init; 2], [Option<Init>; 2]);

impl Weights {
    pub(super) fn new(
        op: &'static str,
        gates: usize,
        [in_dim, hidden_dim]: [usize; 2],
        (weights, biases): Inits,
        (layer_idx, direction): (usize, Direction),
        vb: &VarBuilder,
    ) -> Result<Self> {
        let name = name_at(op, &vb.prefix());
        for (size, what) in [(in_dim, "in_dim"), (hidden_dim, "hidden_dim")] {
            if size == 0 {
                bail!("{name}: {what}: expected at least 1, got 0; give the size of the model")
            }
        }
        let reverse = match direction {
            Direction::Forward => "",
            Direction::Backward => "_reverse",
        };
        let rows = gates * hidden_dim;
        let weight = |what: &str, cols: usize, init: Init| {
            vb.get_with_hints((rows, cols), &format!("weight_{what}_l{layer_idx}{reverse}"), init)
        };
        let bias = |what: &str, init: Option<Init>| {
            let name = format!("bias_{what}_l{layer_idx}{reverse}");
            init.map(|init| vb.get_with_hints(rows, &name, init)).transpose()
        };
        Ok(Self {
            op,
            w_ih: weight("ih", in_dim, weights[0])?,
            w_hh: weight("hh", hidden_dim, weights[1])?,
            b_ih: bias("ih", biases[0])?,
            b_hh: bias("hh", biases[1])?,
            name,
            in_dim,
            hidden_dim,
        })
    }

    /// A state `[B, hidden_dim]` of zeros.
    pub(super) fn zeros(&self, batch: usize) -> Result<Tensor> {
        Tensor::zeros((batch, self.hidden_dim), self.w_hh.dtype(), self.w_hh.device())
    }

    /// The samples of `xs`, if it can be given to this layer.
    pub(super) fn batch_of(&self, xs: &Tensor) -> Result<usize> {
        check_dtype(&self.name, "xs", xs)?;
        check_alike(&self.name, "xs", xs, "the weights", &self.w_ih)?;
        match *xs.dims() {
            [batch, steps, width] if width == self.in_dim && steps > 0 => Ok(batch),
            _ => bail!(
                "{}: xs: expected [B, T, in_dim] with in_dim = {} and at least one step, got {:?}; reshape it",
                self.name,
                self.in_dim,
                xs.dims()
            ),
        }
    }

    /// Checks a part of the state that a sequence of `batch` samples begins with.
    pub(super) fn check_state(&self, part: &str, state: &Tensor, batch: usize) -> Result<()> {
        if state.dims() != [batch, self.hidden_dim] {
            bail!(
                "{}: state.{part}: expected [B, hidden_dim] = [{batch}, {}], got {:?}; begin with zero_state",
                self.name,
                self.hidden_dim,
                state.dims()
            )
        }
        check_alike(&self.name, &format!("state.{part}"), state, "the weights", &self.w_ih)
    }

    /// What the inputs `[B, T, in_dim]` give to the gates of each step: one product for all.
    pub(super) fn of_inputs(&self, xs: &Tensor, masks: &RecurrentMasks) -> Result<Vec<Tensor>> {
        let xs = masks.inputs(&xs.transpose(0, 1)?.contiguous()?)?; // [T, B, in]
        unstack(self.op, &linear_out_in(&xs, &self.w_ih, self.b_ih.as_ref())?)
    }

    /// What a state `[B, hidden_dim]` gives to the gates.
    pub(super) fn of_state(&self, h: &Tensor) -> Result<Tensor> {
        linear_out_in(h, &self.w_hh, self.b_hh.as_ref())
    }

    /// The states `[B, hidden_dim]` of all steps as `[B, T, hidden_dim]`.
    pub(super) fn stacked<'a>(&self, states: impl Iterator<Item = &'a Tensor>) -> Result<Tensor> {
        let states: Vec<_> = states.collect();
        if states.is_empty() {
            bail!("{}: states: expected at least one, got none; give those of seq", self.name)
        }
        Tensor::stack(&states, 1)
    }
}
