use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::ops::sigmoid;
use candle_nn::rnn::{LSTMConfig, LSTMState};

use super::super::site::name_at;
use super::RecurrentDropout;
use super::masks::{RecurrentMasks, Sites};
use super::weights::Weights;
use crate::layers::ScheduledRate;
use crate::layers::site::module_methods;
use crate::mask::MaskGenerator;

/// An LSTM with recurrent dropout: variational, without memory loss, or zoneout.
///
/// ```text
/// i, f, g, o = W_ih d(x_t) + b_ih + W_hh d(h_{t-1}) + b_hh
/// c' = sigmoid(f) c_{t-1} + sigmoid(i) d(tanh(g))          h' = sigmoid(o) tanh(c')
/// c_t = zoneout(c', c_{t-1})                               h_t = zoneout(h', h_{t-1})
/// ```
///
/// with the `d` and `zoneout` of its [`RecurrentDropout`]; what that does not name is the identity. Variables, their
/// names, gates and first values are those of [`candle_nn::LSTM`], so weights of either serve the other, and without
/// dropout, or in evaluation without zoneout, so are the results. The products of the inputs are taken for all steps
/// at once.
///
/// `Direction` chooses names alone, as in candle: give a reversed sequence.
///
/// # Shapes
/// `xs [B, T, in_dim]`, states `[B, hidden_dim]`, outputs `[B, T, hidden_dim]`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all.
///
/// # Randomness
/// One key a call for each site if training, whatever its rate, and none in evaluation. Masks are `[B, C]` for a whole
/// sequence, or that part of `[T, B, C]` which a step is: see [`RecurrentMasks`].
///
/// # Errors
/// A size is 0, a rate is no probability, `vb` holds a variable of another shape; a tensor has another shape, dtype or
/// device than the layer.
///
/// Hochreiter, Schmidhuber, "Long short-term memory", Neural Computation 9, 1997; for what is dropped see
/// [`RecurrentDropout`].
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{Lstm, MaskGenerator, RecurrentDropout, seeded_var_builder};
/// use candle_nn::VarMap;
/// use candle_nn::rnn::LSTMConfig;
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
/// let dropout = RecurrentDropout::Zoneout { cell_p: 0.5, state_p: 0.05 };
/// let layer = Lstm::new(3, 8, LSTMConfig::default(), dropout, Arc::new(MaskGenerator::new(2)), vb)?;
/// let xs = Tensor::ones((2, 5, 3), DType::F32, &Device::Cpu)?;
/// assert_eq!(layer.forward(&xs, true)?.dims(), [2, 5, 8]);
///
/// // A long text, piece by piece: the state is carried on.
/// let states = layer.seq(&xs, true)?;
/// let more = layer.seq_init(&xs, &states[4], true)?;
/// assert_eq!(more[4].h().dims(), [2, 8]);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "VariationalLstm")]
#[doc(alias = "RecurrentDropoutLstm")]
#[doc(alias = "ZoneoutLstm")]
#[derive(Clone, Debug)]
pub struct Lstm {
    weights: Weights,
    dropout: RecurrentDropout,
    sites: Sites,
    generator: Arc<MaskGenerator>,
}

const NAME: &str = "lstm";

impl Lstm {
    /// Builds the layer from the variables of `vb`, creating those that do not exist.
    ///
    /// # Errors
    /// A size is 0, a rate is no probability, or `vb` holds a variable of another shape.
    pub fn new(
        in_dim: usize,
        hidden_dim: usize,
        config: LSTMConfig,
        dropout: RecurrentDropout,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let inits = ([config.w_ih_init, config.w_hh_init], [config.b_ih_init, config.b_hh_init]);
        let place = (config.layer_idx, config.direction);
        let sites = Sites::new(&name_at(NAME, &vb.prefix()), dropout, true, &generator)?;
        let weights = Weights::new(NAME, 4, [in_dim, hidden_dim], inits, place, &vb)?;
        Ok(Self { weights, dropout, sites, generator })
    }

    /// What it drops.
    pub fn dropout(&self) -> RecurrentDropout {
        self.dropout
    }

    /// Changes what it drops, or how much of it.
    ///
    /// # Errors
    /// A rate is no probability; the layer goes on with what it had.
    pub fn set_dropout(&mut self, dropout: RecurrentDropout) -> Result<()> {
        self.sites = Sites::new(&self.weights.name, dropout, true, &self.generator)?;
        self.dropout = dropout;
        Ok(())
    }

    /// The state that a sequence begins with: zeros.
    ///
    /// # Errors
    /// Its memory cannot be allocated.
    pub fn zero_state(&self, batch: usize) -> Result<LSTMState> {
        let zeros = self.weights.zeros(batch)?;
        Ok(LSTMState::new(zeros.clone(), zeros))
    }

    /// The masks of one call, a key for each site if `train`: for [`seq_masked`](Self::seq_masked).
    ///
    /// # Errors
    /// None that [`new`](Self::new) has not given.
    pub fn next_masks(&self, train: bool) -> Result<RecurrentMasks> {
        self.sites.next_masks(&self.weights.name, train)
    }

    /// The states after each step of `xs`, from [`zero_state`](Self::zero_state) on; drops if `train` is true.
    ///
    /// # Errors
    /// `xs` is not `[B, T, in_dim]` of the dtype and the device of the weights.
    pub fn seq(&self, xs: &Tensor, train: bool) -> Result<Vec<LSTMState>> {
        let state = self.zero_state(self.weights.batch_of(xs)?)?;
        self.seq_init(xs, &state, train)
    }

    /// The same from another state on.
    ///
    /// # Errors
    /// Those of [`seq`](Self::seq), and `state` is not `[B, hidden_dim]`, of the same dtype and device.
    pub fn seq_init(&self, xs: &Tensor, state: &LSTMState, train: bool) -> Result<Vec<LSTMState>> {
        self.check(xs, state)?;
        self.seq_masked(xs, state, &self.next_masks(train)?)
    }

    /// The same with given masks: for a sequence, or a batch, in parts with the masks of the whole.
    ///
    /// # Errors
    /// Those of [`seq_init`](Self::seq_init), and the window of `masks` does not fit.
    pub fn seq_masked(
        &self,
        xs: &Tensor,
        state: &LSTMState,
        masks: &RecurrentMasks,
    ) -> Result<Vec<LSTMState>> {
        masks.check(&self.weights.name, self.check(xs, state)?)?;
        let mut states: Vec<LSTMState> = Vec::new();
        for (step, of_input) in self.weights.of_inputs(xs, masks)?.iter().enumerate() {
            let next = self.next(step, of_input, states.last().unwrap_or(state), masks)?;
            states.push(next);
        }
        Ok(states)
    }

    fn next(
        &self,
        step: usize,
        of_input: &Tensor,
        old: &LSTMState,
        masks: &RecurrentMasks,
    ) -> Result<LSTMState> {
        let of_state = self.weights.of_state(&masks.state(step, &old.h)?)?;
        let gates = (of_input + of_state)?.chunk(4, 1)?;
        let [i, f, o] = [sigmoid(&gates[0])?, sigmoid(&gates[1])?, sigmoid(&gates[3])?];
        let g = masks.candidate(step, &gates[2].tanh()?)?;
        let c = ((f * &old.c)? + (i * g)?)?;
        let h = (o * c.tanh()?)?;
        Ok(LSTMState::new(masks.new_state(step, &h, &old.h)?, masks.cell(step, &c, &old.c)?))
    }

    fn check(&self, xs: &Tensor, state: &LSTMState) -> Result<usize> {
        let batch = self.weights.batch_of(xs)?;
        self.weights.check_state("h", &state.h, batch)?;
        self.weights.check_state("c", &state.c, batch)?;
        Ok(batch)
    }

    /// The outputs of all steps, `[B, T, hidden_dim]`.
    ///
    /// # Errors
    /// There is no state.
    pub fn states_to_tensor(&self, states: &[LSTMState]) -> Result<Tensor> {
        self.weights.stacked(states.iter().map(LSTMState::h))
    }

    /// The outputs of [`seq`](Self::seq): `[B, T, hidden_dim]`, for a layer above.
    ///
    /// # Errors
    /// Those of [`seq`](Self::seq).
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.states_to_tensor(&self.seq(xs, train)?)
    }

    /// The same layer, whose rates, those that [`dropout`](Self::dropout) names, are that of a schedule at each step,
    /// until [`set_dropout`](Self::set_dropout) gives others.
    pub fn following(mut self, rate: &ScheduledRate) -> Self {
        self.sites = self.sites.following(rate);
        self
    }
}

module_methods!(Lstm);
