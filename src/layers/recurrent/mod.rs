//! Recurrent layers over candle-nn's weights: what they drop is theirs alone, the rest is candle's formula.

mod gru;
mod lstm;
mod masks;
mod unstack;
mod weights;

pub use gru::Gru;
pub use lstm::Lstm;
pub use masks::RecurrentMasks;

/// What a recurrent layer, [`Lstm`] or [`Gru`], drops in training.
///
/// | | paper | what drops | masks | keys a call |
/// |---|---|---|---|---|
/// | [`Variational`](Self::Variational) | Gal, Ghahramani 2016 | inputs and states, before the products | one a sequence | 2 |
/// | [`Naive`](Self::Naive) | | the same | one a step | 2 |
/// | [`NoMemoryLoss`](Self::NoMemoryLoss) | Semeniuta et al. 2016 | the candidate of the update | either | 1 |
/// | [`Zoneout`](Self::Zoneout) | Krueger et al. 2017 | updates of cells and states | one a step | 2, of a GRU 1 |
///
/// Every rate is a probability of dropping. Layers of other names: `VariationalLstm` and Keras' `LSTM(dropout=..,
/// recurrent_dropout=..)` are `Variational`, `RecurrentDropoutLstm` and TensorFlow's `LayerNormBasicLSTMCell(
/// dropout_keep_prob=..)` are `NoMemoryLoss`, `ZoneoutLstm` is `Zoneout`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RecurrentDropout {
    /// Nothing: the layer is candle's.
    #[default]
    None,
    /// One mask over inputs and one over states, the same at each step of a sequence and for each gate ("tied").
    ///
    /// A state that enters the products of a step is masked; that which a GRU carries on is not.
    ///
    /// Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016,
    /// arXiv 1512.05287.
    #[doc(alias = "VariationalLstm")]
    #[doc(alias = "VariationalGru")]
    #[doc(alias = "recurrent_dropout")]
    Variational {
        /// Of an element of the input.
        input_p: f64,
        /// Of an element of the state.
        state_p: f64,
    },
    /// The same with fresh masks at each step: what the other three are measured against.
    Naive {
        /// Of an element of the input.
        input_p: f64,
        /// Of an element of the state.
        state_p: f64,
    },
    /// Dropout of the candidate alone, `tanh(..)`, which a gate adds to the memory: what is remembered is not dropped.
    ///
    /// Semeniuta, Severyn, Barth, "Recurrent dropout without memory loss", 2016, arXiv 1603.05118.
    #[doc(alias = "RecurrentDropoutLstm")]
    #[doc(alias = "RecurrentDropoutGru")]
    NoMemoryLoss {
        /// Of an element of the candidate.
        drop_p: f64,
        /// The paper has both.
        masks: MaskPer,
    },
    /// Elements of cell and state that keep their old value, drawn anew at each step; in evaluation the expectation.
    ///
    /// As in the paper, the new state of an LSTM is made of the updated cell, not of what zoneout has left of it.
    ///
    /// Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", 2017, arXiv 1606.01305.
    #[doc(alias = "ZoneoutLstm")]
    #[doc(alias = "ZoneoutGru")]
    Zoneout {
        /// Of an element of the cell to stay; 0 for a GRU, which has none.
        cell_p: f64,
        /// Of an element of the state to stay.
        state_p: f64,
    },
}

/// How long a mask of a recurrent layer is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MaskPer {
    /// One mask for all steps of a sequence.
    Sequence,
    /// A mask for each step.
    #[default]
    Step,
}
