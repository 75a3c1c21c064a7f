//! Attentions to test, and where their tensors lie.

use candle_dropout::functional::{AttentionArgs, AttentionLayout, HeadStrides};

use candle_dropout::MaskArgs;

use crate::host::Mask;

const UNBOUNDED: u32 = AttentionArgs::UNBOUNDED;

/// Where the heads of a tensor lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    /// `[B, H, S, D]`.
    HeadsFirst,
    /// `[B, S, H, D]`, as a projection produces it.
    Projection,
    /// `[B, S, H + 2 Hkv, D]`: queries, keys and values of one projection.
    Packed,
    /// As many elements between rows as there are in one, full of NaN.
    Spread,
    /// One element between rows, so that few of them begin at 16-byte boundaries.
    Odd,
}

/// An attention over part of a mask, and where its tensors lie.
pub struct Form {
    pub batches: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub head_size: usize,
    pub order: Order,
    /// Elements by which views begin behind a 16-byte boundary.
    pub offset: usize,
    /// Keys that a query sees before and after its own.
    pub left: u32,
    pub right: u32,
    pub scale: f64,
    pub softcap: f64,
    pub lengths: Option<Vec<u32>>,
    pub slopes: Option<Vec<f32>>,
    /// The square root of what all products of a query and a key have in common. Beyond 0 they are whole numbers,
    /// which every sum in f32 holds exactly.
    pub far: f64,
    pub mask: Mask,
    /// Keys are dropped, not weights.
    pub drop_key: bool,
}

impl Form {
    /// One sample with one head, every key visible, a mask of its own size.
    pub fn new([queries, keys, head_size]: [usize; 3], drop_p: f32) -> Self {
        Self::with_heads([1, 1, 1], [queries, keys, head_size], drop_p)
    }

    /// Samples, heads, heads of keys and values.
    pub fn with_heads(
        [batches, heads, kv_heads]: [usize; 3],
        [queries, keys, head_size]: [usize; 3],
        drop_p: f32,
    ) -> Self {
        let dims = [batches, heads, queries, keys];
        Self {
            batches,
            heads,
            kv_heads,
            queries,
            keys,
            head_size,
            order: Order::HeadsFirst,
            offset: 0,
            left: UNBOUNDED,
            right: UNBOUNDED,
            scale: 1. / (head_size as f64).sqrt(),
            softcap: 0.,
            lengths: None,
            slopes: None,
            far: 0.,
            mask: Mask::from_start(drop_p, &dims, &[0; 4]),
            drop_key: false,
        }
    }

    pub fn causal(self) -> Self {
        Self { right: 0, ..self }
    }

    pub fn window(self, left: u32, right: u32) -> Self {
        Self { left, right, ..self }
    }

    /// Penalties that differ a lot from head to head.
    pub fn alibi(self) -> Self {
        let slopes = (0..self.heads).map(|head| 0.5f32.powi(head as i32 + 1)).collect();
        Self { slopes: Some(slopes), ..self }
    }

    pub fn dims(&self) -> [usize; 4] {
        [self.batches, self.heads, self.queries, self.keys]
    }

    pub fn args(&self) -> AttentionArgs {
        AttentionArgs {
            scale: self.scale,
            softcap: self.softcap,
            batches: self.batches as u32,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            queries: self.queries as u32,
            keys: self.keys as u32,
            head_size: self.head_size as u32,
            left: self.left,
            right: self.right,
            drop_key: u32::from(self.drop_key),
            padding: 0,
        }
    }

    /// The mask as the kernels get it.
    pub fn mask_args(&self) -> MaskArgs {
        if self.drop_key { self.mask.args.unscaled() } else { self.mask.args }
    }

    /// What kept weights are multiplied by.
    pub fn drop_scale(&self) -> f64 {
        if self.drop_key { 1. } else { self.mask.scale }
    }

    /// Written out as the definition reads, apart from what kernels and op do.
    pub fn sees(&self, batch: usize, query: usize, key: usize) -> bool {
        let ahead = (key + self.queries) as i64 - (query + self.keys) as i64;
        (self.left == UNBOUNDED || -ahead <= i64::from(self.left))
            && (self.right == UNBOUNDED || ahead <= i64::from(self.right))
            && self.lengths.as_ref().is_none_or(|lengths| key < lengths[batch] as usize)
    }

    pub fn what(&self) -> String {
        let Self { order, offset, left, right, softcap, lengths, slopes, drop_key, .. } = self;
        format!(
            "{:?} x {}, {} kv heads, {order:?} + {offset}, left {left}, right {right}, softcap {softcap}, \
             lengths {lengths:?}, slopes {slopes:?}, drop key {drop_key}, {:?}",
            self.dims(),
            self.head_size,
            self.kv_heads,
            self.mask.args
        )
    }

    /// Where q and o, and where k and v lie: strides, and the element at which q, k and v begin in a packed
    /// tensor.
    pub fn place(&self) -> (AttentionLayout, [usize; 4]) {
        let Self { heads, kv_heads, queries, keys, head_size: d, order, .. } = *self;
        let strides = |[batch, head, row]: [usize; 3]| {
            let [batch, head, row] = [batch, head, row].map(|stride| stride as u64);
            HeadStrides { batch, head, row }
        };
        let of = |heads: usize, rows: usize| match order {
            Order::HeadsFirst => strides([heads * rows * d, rows * d, d]),
            Order::Projection => strides([rows * heads * d, d, heads * d]),
            Order::Packed => {
                let all = self.heads + 2 * kv_heads;
                strides([rows * all * d, d, all * d])
            }
            Order::Spread => strides([heads * rows * 2 * d, rows * 2 * d, 2 * d]),
            Order::Odd => strides([heads * rows * (d + 1), rows * (d + 1), d + 1]),
        };
        let (q, k) = (of(heads, queries), of(kv_heads, keys));
        let packed = order == Order::Packed;
        let o = if packed { strides([queries * heads * d, d, heads * d]) } else { q };
        let starts = if packed { [0, heads * d, (heads + kv_heads) * d, 0] } else { [0; 4] };
        (AttentionLayout { q, k, v: k, o }, starts)
    }
}

/// Sizes around those of tiles, alone and at several head sizes.
pub fn shapes(head_sizes: &[usize]) -> Vec<Form> {
    let mut forms = Vec::new();
    let sizes = [[1, 1], [3, 70], [65, 5], [64, 64], [63, 129], [130, 33]];
    for (at, &[queries, keys]) in sizes.iter().enumerate() {
        for (turn, &head_size) in head_sizes.iter().enumerate() {
            // Each pair of sizes meets several head sizes, each head size several pairs.
            if (at + turn) % 3 == 0 || queries * keys < 300 {
                let drop_p = [0.1, 0., 0.5][(at + turn / 3) % 3];
                forms.push(Form::new([queries, keys, head_size], drop_p));
            }
        }
    }
    forms
}

/// Each feature alone and several at once, with sizes that are no multiples of anything.
pub fn features() -> Vec<Form> {
    let base = |drop_p| Form::with_heads([2, 4, 2], [37, 70, 24], drop_p);
    let tall = |drop_p| Form::with_heads([2, 2, 1], [75, 40, 20], drop_p);
    let lengths = |lengths: &[u32]| Some(lengths.to_vec());
    vec![
        base(0.2),
        base(0.),
        base(1.),
        base(0.2).causal(),
        base(0.).causal(),
        tall(0.2).causal(),
        tall(0.).causal(),
        base(0.2).window(9, 4),
        base(0.2).window(UNBOUNDED, 7),
        base(0.2).window(11, UNBOUNDED),
        tall(0.3).window(5, 0),
        Form { softcap: 1.5, ..base(0.2) },
        Form { softcap: 1.5, ..base(0.) },
        Form { softcap: 0.7, ..tall(0.2).causal().alibi() },
        Form { scale: -0.3, ..base(0.2).causal() },
        Form { scale: 0., ..base(0.2) },
        base(0.2).alibi(),
        tall(0.2).alibi(),
        Form { lengths: lengths(&[70, 33]), ..base(0.2) },
        Form { lengths: lengths(&[0, 65]), ..base(0.2).causal() },
        Form { lengths: lengths(&[7, 99]), ..tall(0.) },
        Form { lengths: lengths(&[64, 1]), softcap: 2., ..base(0.4).window(20, 3).alibi() },
        Form::with_heads([1, 6, 1], [20, 90, 16], 0.2).causal(),
        Form::with_heads([1, 3, 3], [90, 90, 16], 0.2).causal(),
        // Logits that rise from tile to tile, a lot or a little.
        Form::with_heads([1, 4, 2], [40, 200, 24], 0.2).causal().alibi(),
        Form { scale: 3., ..Form::with_heads([1, 2, 2], [40, 200, 72], 0.) },
        // Limits that no key or no query lies within.
        Form { lengths: lengths(&[2, 1]), ..base(0.2).window(3, 2) },
        base(0.1).window(0, 0),
        base(0.1).window(UNBOUNDED - 1, UNBOUNDED - 1),
    ]
}

/// Keys dropped: at every way through the kernels, with what else hides keys and changes scores, and in windows.
pub fn drop_keys(head_sizes: &[usize]) -> Vec<Form> {
    let base = |drop_p| Form::with_heads([2, 4, 2], [37, 70, 24], drop_p);
    let tall = |drop_p| Form::with_heads([2, 2, 1], [75, 40, 20], drop_p);
    let mut forms = vec![
        base(0.2),
        // Whole rows are dropped, and so is everything.
        Form::new([70, 3, 8], 0.7),
        Form::new([9, 35, 8], 1.),
        base(0.3).causal(),
        tall(0.3).window(5, 0),
        Form { scale: -0.3, softcap: 0.7, ..tall(0.2).causal().alibi() },
        Form { lengths: Some(vec![64, 1]), softcap: 2., ..base(0.4).window(20, 3).alibi() },
        // What is dropped may be far above all that is kept, where exponentials are infinite.
        Form { scale: 80., ..base(0.8) },
        Form { scale: 80., softcap: 300., ..base(0.8).causal() },
    ];
    forms.extend(head_sizes.iter().map(|&head_size| Form::new([40, 70, head_size], 0.3)));
    forms.extend(masks().into_iter().filter(|form| form.keys == 45));
    forms.into_iter().map(|form| Form { drop_key: true, ..form }).collect()
}

/// Scores that are exact and far from 0, on either side.
pub fn far() -> Vec<Form> {
    let base = |far: f64, drop_p| Form {
        far,
        scale: 0.25,
        ..Form::with_heads([1, 2, 1], [37, 150, 24], drop_p)
    };
    vec![
        base(64., 0.),
        base(1024., 0.),
        base(1024., 0.2).causal(),
        base(1024., 0.).window(90, 5),
        Form { scale: -0.25, ..base(1024., 0.) },
        base(1024., 0.1).alibi(),
    ]
}

/// Every order in memory, aligned and not, vectors and not.
pub fn layouts() -> Vec<Form> {
    let mut forms = Vec::new();
    for order in [Order::HeadsFirst, Order::Projection, Order::Packed, Order::Spread, Order::Odd] {
        for (head_size, offset) in [(32, 0), (32, 1), (9, 0), (14, 2), (40, 8)] {
            // 24 rows of odd stride are whole vectors again, so samples begin at 16-byte boundaries.
            let rows = if order == Order::Odd { 24 } else { 21 };
            let form = Form::with_heads([2, 4, 2], [rows, rows, head_size], 0.2);
            forms.push(Form { order, offset, ..form.causal() });
        }
    }
    forms
}

/// Parts of larger masks, that begin at whole Philox calls or within one; extreme rates.
pub fn masks() -> Vec<Form> {
    let mut forms = Vec::new();
    for start in [[0, 0, 0, 8], [1, 2, 3, 64], [0, 0, 0, 3], [2, 1, 0, 13], [1, 0, 7, 31]] {
        let form = Form::with_heads([2, 2, 1], [19, 45, 8], 0.);
        let dims = form.dims();
        let full: Vec<usize> = (0..4).map(|d| start[d] + dims[d] + d % 2).collect();
        let mask = Mask::window(0.4, [&dims, &full, &start]);
        forms.push(Form { mask, ..form });
    }
    // Rows and columns that need more than 32 bits.
    let form = Form::with_heads([1, 2, 2], [5, 20, 8], 0.);
    for start in [(1 << 33) + 8, (1 << 33) + 5] {
        let dims = form.dims();
        let full = [1 << 20, 1 << 10, 1 << 30, 1 << 34];
        let mask = Mask::window(0.5, [&dims, &full, &[1 << 19, 3, 77, start]]);
        forms.push(Form { mask, ..Form::with_heads([1, 2, 2], [5, 20, 8], 0.) });
    }
    for drop_p in [1. / 65536., 65535. / 65536.] {
        forms.push(Form::new([40, 90, 8], drop_p));
    }
    // A draw that equals the threshold is dropped, in either half of a word.
    for element in [0, 1] {
        let form = Form::new([3, 20, 8], 0.);
        let of_threshold = |threshold: u32| {
            Mask::from_start((65536 - threshold) as f32 / 65536., &form.dims(), &[0; 4])
        };
        // The draw is the largest threshold that drops its element.
        let draw = (0..16).rev().map(|bit| 1 << bit).fold(0, |draw, bit| {
            if of_threshold(draw + bit).keep[element] { draw } else { draw + bit }
        });
        forms.push(Form { mask: of_threshold(draw), ..form });
    }
    forms
}
