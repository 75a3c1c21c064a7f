//! `candle_nn::kv_cache`, with caches that pass the gradient of what is appended on.
//!
//! Candle's write into memory of their own, or detach, so whatever goes through one trains as if frozen, in models that
//! append to their cache in training, too. Here keys and values of one call keep their gradient through what that call
//! returns; those of the calls before are constants, as in Transformer-XL. Values, shapes and memory are candle's, and
//! nothing is copied that tracks no gradient.
//!
//! A cache holds what the last call returned, and with it, if it tracks a gradient, the graph of that call, until the
//! next call or `reset`: a `reset` after each step frees it.
//!
//! What a full [`RotatingCache`] returns without a gradient is overwritten by the next call, so there is one `backward`
//! an `append`; see [`RotatingCache::append`].
//!
//! One text, since all are one idea: what candle's returns, with the part that was appended just now put in its place.

use candle_core::{D, DType, Device, Result, Tensor};
pub use candle_nn::kv_cache::*;

use super::refuse_tracked;

/// Parts of one tensor, in order.
fn joined(parts: &[Tensor], dim: usize) -> Result<Tensor> {
    match parts {
        [part] => Ok(part.clone()),
        parts => Tensor::cat(parts, dim),
    }
}

/// A cache with room for `max_seq_len` positions, which grows by as many, in the place of
/// [`candle_nn::kv_cache::Cache`].
///
/// # Example
/// ```
/// use candle_core::{Device, Var};
/// use candle_dropout::nn::kv_cache::Cache;
///
/// # fn main() -> candle_core::Result<()> {
/// let mut cache = Cache::new(0, 8);
/// let k = Var::new(&[1f32, 2.], &Device::Cpu)?;
/// cache.append(&k)?;
/// let all = cache.current_data()?.expect("two positions");
/// let grads = all.sqr()?.sum_all()?.backward()?;
/// assert_eq!(grads.get(&k).expect("a gradient").to_vec1::<f32>()?, [2., 4.]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Cache {
    inner: candle_nn::kv_cache::Cache,
    /// What is there, if what came last tracks a gradient.
    tracked: Option<Tensor>,
}

impl Cache {
    /// An empty cache of tensors that grow along `dim`.
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { inner: candle_nn::kv_cache::Cache::new(dim, max_seq_len), tracked: None }
    }

    /// The dimension of positions.
    pub fn dim(&self) -> usize {
        self.inner.dim()
    }

    /// Positions that are there.
    pub fn current_seq_len(&self) -> usize {
        self.inner.current_seq_len()
    }

    /// Positions that there is room for.
    pub fn max_seq_len(&self) -> usize {
        self.inner.max_seq_len()
    }

    /// The memory, with what is not filled yet; it tracks no gradient.
    pub fn all_data(&self) -> &Option<Tensor> {
        self.inner.all_data()
    }

    /// What is there.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn current_data(&self) -> Result<Option<Tensor>> {
        match &self.tracked {
            Some(tracked) => Ok(Some(tracked.clone())),
            None => self.inner.current_data(),
        }
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.tracked = None;
        self.inner.reset()
    }

    /// Appends the positions of `src`.
    ///
    /// # Errors
    /// `src` has no dimension of positions, or another shape or dtype than what is there.
    pub fn append(&mut self, src: &Tensor) -> Result<()> {
        self.tracked = None;
        if !src.track_op() {
            return self.inner.append(src);
        }
        let before = self.inner.current_data()?;
        self.inner.append(&src.contiguous()?.detach())?;
        let parts: Vec<_> = before.into_iter().chain([src.clone()]).collect();
        self.tracked = Some(joined(&parts, self.dim())?);
        Ok(())
    }
}

/// Two [`Cache`]s, in the place of [`candle_nn::kv_cache::KvCache`].
#[derive(Debug, Clone)]
pub struct KvCache {
    k: Cache,
    v: Cache,
}

impl KvCache {
    /// An empty cache of tensors that grow along `dim`.
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { k: Cache::new(dim, max_seq_len), v: Cache::new(dim, max_seq_len) }
    }

    /// That of the keys.
    pub fn k_cache(&self) -> &Cache {
        &self.k
    }

    /// That of the values.
    pub fn v_cache(&self) -> &Cache {
        &self.v
    }

    /// That of the keys.
    pub fn k_cache_mut(&mut self) -> &mut Cache {
        &mut self.k
    }

    /// That of the values.
    pub fn v_cache_mut(&mut self) -> &mut Cache {
        &mut self.v
    }

    /// The keys that are there.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.k.current_data()
    }

    /// The values that are there.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.v.current_data()
    }

    /// Appends, and returns all keys and all values.
    ///
    /// # Errors
    /// Those of [`Cache::append`].
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let of = |cache: &mut Cache, src: &Tensor| -> Result<Tensor> {
            cache.append(src)?;
            Ok(cache.current_data()?.unwrap_or_else(|| src.clone()))
        };
        Ok((of(&mut self.k, &k.contiguous()?)?, of(&mut self.v, &v.contiguous()?)?))
    }

    /// Positions that are there.
    pub fn current_seq_len(&self) -> usize {
        self.k.current_seq_len()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.k.reset();
        self.v.reset();
    }
}

/// A cache of the last `max_seq_len` positions, in the place of [`candle_nn::kv_cache::RotatingCache`].
#[derive(Debug, Clone)]
pub struct RotatingCache {
    inner: candle_nn::kv_cache::RotatingCache,
    /// What is kept, if what came last tracks a gradient.
    tracked: Option<Tensor>,
}

impl RotatingCache {
    /// An empty cache of tensors that grow along `dim`.
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { inner: candle_nn::kv_cache::RotatingCache::new(dim, max_seq_len), tracked: None }
    }

    /// Where the next position is written.
    pub fn offset(&self) -> usize {
        self.inner.offset()
    }

    /// The dimension of positions.
    pub fn dim(&self) -> usize {
        self.inner.dim()
    }

    /// Positions seen so far.
    pub fn current_seq_len(&self) -> usize {
        self.inner.current_seq_len()
    }

    /// Positions that are kept.
    pub fn max_seq_len(&self) -> usize {
        self.inner.max_seq_len()
    }

    /// The memory, with what is not filled yet; it tracks no gradient.
    pub fn all_data(&self) -> &Option<Tensor> {
        self.inner.all_data()
    }

    /// What is kept.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn current_data(&self) -> Result<Option<Tensor>> {
        match &self.tracked {
            Some(tracked) => Ok(Some(tracked.clone())),
            None => self.inner.current_data(),
        }
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.tracked = None;
        self.inner.reset()
    }

    /// Appends the positions of `src`, and returns what queries at them see.
    ///
    /// If `src` tracks no gradient, what is returned is candle's, the memory of the cache itself, which later calls
    /// write over once it is full. A product with a tracked tensor saves it for backward: call `backward` before the
    /// next `append`, or `copy()` it.
    ///
    /// # Errors
    /// `src` has no dimension of positions, or another shape or dtype than what is there.
    pub fn append(&mut self, src: &Tensor) -> Result<Tensor> {
        let (dim, start, room) = (self.dim(), self.offset(), self.max_seq_len());
        self.tracked = None;
        let kept = self.inner.append(&src.detach())?;
        if !src.track_op() {
            return Ok(kept);
        }
        let positions = src.dim(dim)?;
        if positions >= room {
            self.tracked = Some(src.narrow(dim, positions - room, room)?);
            return Ok(src.clone());
        }
        // From the place that was next on, and if that is too short the rest at the beginning.
        let after = start + positions.min(room - start);
        let wrapped = positions - (after - start);
        let len = kept.dim(dim)?;
        let parts = [
            src.narrow(dim, after - start, wrapped)?,
            kept.narrow(dim, wrapped, start - wrapped)?,
            src.narrow(dim, 0, after - start)?,
            kept.narrow(dim, after, len - after)?,
        ];
        let parts: Vec<_> = parts.into_iter().filter(|part| part.dims()[dim] > 0).collect();
        let all = joined(&parts, dim)?;
        self.tracked = Some(all.clone());
        Ok(all)
    }

    /// The positions of what is returned after `seq_len` more are appended.
    pub fn positions(&self, seq_len: usize) -> Vec<usize> {
        self.inner.positions(seq_len)
    }

    /// The mask for queries at `seq_len` positions after they are appended: 1 where a key is hidden.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn attn_mask(&self, seq_len: usize, device: &Device) -> Result<Option<Tensor>> {
        self.inner.attn_mask(seq_len, device)
    }
}

/// Two [`RotatingCache`]s, in the place of [`candle_nn::kv_cache::RotatingKvCache`].
#[derive(Debug, Clone)]
pub struct RotatingKvCache {
    k: RotatingCache,
    v: RotatingCache,
}

impl RotatingKvCache {
    /// An empty cache of tensors that grow along `dim`.
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { k: RotatingCache::new(dim, max_seq_len), v: RotatingCache::new(dim, max_seq_len) }
    }

    /// That of the keys.
    pub fn k_cache(&self) -> &RotatingCache {
        &self.k
    }

    /// That of the values.
    pub fn v_cache(&self) -> &RotatingCache {
        &self.v
    }

    /// That of the keys.
    pub fn k_cache_mut(&mut self) -> &mut RotatingCache {
        &mut self.k
    }

    /// That of the values.
    pub fn v_cache_mut(&mut self) -> &mut RotatingCache {
        &mut self.v
    }

    /// The keys that are kept.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.k.current_data()
    }

    /// The values that are kept.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.v.current_data()
    }

    /// Appends, and returns keys and values that queries at these positions see.
    ///
    /// # Errors
    /// Those of [`RotatingCache::append`].
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.k.append(k)?, self.v.append(v)?))
    }

    /// Where the next position is written.
    pub fn offset(&self) -> usize {
        self.k.offset()
    }

    /// Positions seen so far.
    pub fn current_seq_len(&self) -> usize {
        self.k.current_seq_len()
    }

    /// As [`RotatingCache::attn_mask`].
    ///
    /// # Errors
    /// Those of candle's.
    pub fn attn_mask(&self, seq_len: usize, device: &Device) -> Result<Option<Tensor>> {
        self.k.attn_mask(seq_len, device)
    }

    /// As [`RotatingCache::positions`].
    pub fn positions(&self, seq_len: usize) -> Vec<usize> {
        self.k.positions(seq_len)
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.k.reset();
        self.v.reset();
    }
}

/// A cache that is joined anew at each call, in the place of [`candle_nn::kv_cache::ConcatKvCache`].
#[derive(Debug, Clone)]
pub struct ConcatKvCache {
    k: Option<Tensor>,
    v: Option<Tensor>,
    dim: usize,
}

impl ConcatKvCache {
    /// An empty cache of tensors that grow along `dim`.
    pub fn new(dim: usize) -> Self {
        Self { k: None, v: None, dim }
    }

    /// Positions that are there.
    pub fn current_seq_len(&self) -> usize {
        self.k.as_ref().and_then(|k| k.dims().get(self.dim).copied()).unwrap_or(0)
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.k.is_none()
    }

    /// The dimension of positions.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Appends, and returns all keys and all values.
    ///
    /// # Errors
    /// `k` or `v` has another shape, dtype or device than what is there.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let with = |before: &Option<Tensor>, src: &Tensor| {
            let before = before.as_ref().map(Tensor::detach);
            let parts: Vec<_> = before.into_iter().chain([src.contiguous()?]).collect();
            joined(&parts, self.dim)
        };
        let (k, v) = (with(&self.k, k)?, with(&self.v, v)?);
        (self.k, self.v) = (Some(k.clone()), Some(v.clone()));
        Ok((k, v))
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.k = None;
        self.v = None;
    }

    /// All keys.
    pub fn k(&self) -> Option<&Tensor> {
        self.k.as_ref()
    }

    /// All values.
    pub fn v(&self) -> Option<&Tensor> {
        self.v.as_ref()
    }

    /// All keys.
    pub fn k_mut(&mut self) -> Option<&mut Tensor> {
        self.k.as_mut()
    }

    /// All values.
    pub fn v_mut(&mut self) -> Option<&mut Tensor> {
        self.v.as_mut()
    }

    /// All keys and all values.
    pub fn into_inner(self) -> Option<(Tensor, Tensor)> {
        self.k.zip(self.v)
    }
}

/// A cache with the key and the value of a position side by side, in the place of
/// [`candle_nn::kv_cache::InterleavedKvCache`].
#[derive(Debug, Clone)]
pub struct InterleavedKvCache {
    kv: Option<Tensor>,
    head_dim: usize,
}

impl InterleavedKvCache {
    /// An empty cache for heads of `head_dim` elements.
    pub fn new(head_dim: usize) -> Self {
        Self { kv: None, head_dim }
    }

    /// Positions that are there.
    pub fn current_seq_len(&self) -> usize {
        self.kv.as_ref().and_then(|kv| kv.dims().first().copied()).unwrap_or(0)
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.kv.is_none()
    }

    /// Appends `k` and `v` of shape `[1, Hkv, S, D]`, and returns all, `[S, Hkv, 2 D]`.
    ///
    /// # Errors
    /// `k` or `v` has another shape, dtype or device than what is there.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let rows = |x: &Tensor| x.squeeze(0)?.transpose(0, 1)?.contiguous();
        let appended = Tensor::cat(&[rows(k)?, rows(v)?], D::Minus1)?;
        let before = self.kv.as_ref().map(Tensor::detach);
        let parts: Vec<_> = before.into_iter().chain([appended]).collect();
        let kv = joined(&parts, 0)?;
        self.kv = Some(kv.clone());
        Ok(kv)
    }

    /// All that is there, `[S, Hkv, 2 D]`.
    pub fn kv(&self) -> Option<&Tensor> {
        self.kv.as_ref()
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.kv = None;
    }
}

/// Makes [`ScatteredKvCache`]s, in the place of [`candle_nn::kv_cache::ScatteredCacheBuilder`].
#[derive(Debug, Clone)]
pub struct ScatteredCacheBuilder(candle_nn::kv_cache::ScatteredCacheBuilder);

impl ScatteredCacheBuilder {
    /// For caches of `context` positions.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn new(batch_size: usize, context: usize, dtype: DType, device: &Device) -> Result<Self> {
        candle_nn::kv_cache::ScatteredCacheBuilder::new(batch_size, context, dtype, device)
            .map(Self)
    }

    /// A cache of zeros.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn make_cache(&self, num_heads: usize, head_dim: usize) -> Result<ScatteredKvCache> {
        self.0.make_cache(num_heads, head_dim).map(ScatteredKvCache)
    }

    /// The position that each batch entry is at.
    pub fn positions(&self) -> &[usize] {
        self.0.positions()
    }

    /// Begins anew.
    pub fn reset(&mut self) {
        self.0.reset()
    }

    /// Batch entries.
    pub fn batch_size(&self) -> usize {
        self.0.batch_size()
    }

    /// Begins one batch entry anew.
    pub fn reset_batch_index(&mut self, batch_index: usize) {
        self.0.reset_batch_index(batch_index)
    }

    /// Where the next `seq_len` positions go, of those batch entries that `batch_mask` names, and what they see.
    ///
    /// # Errors
    /// Those of candle's.
    pub fn indices_and_mask(
        &mut self,
        seq_len: usize,
        batch_mask: &[bool],
    ) -> Result<IndicesAndMask> {
        self.0.indices_and_mask(seq_len, batch_mask)
    }

    /// The device of the caches.
    pub fn device(&self) -> &Device {
        self.0.device()
    }
}

/// A cache whose batch entries are at positions of their own, in the place of
/// [`candle_nn::kv_cache::ScatteredKvCache`]: for tensors that track no gradient.
#[derive(Debug, Clone)]
pub struct ScatteredKvCache(candle_nn::kv_cache::ScatteredKvCache);

impl ScatteredKvCache {
    /// Appends, and returns all keys and all values.
    ///
    /// What is returned is the memory of the cache, which later calls write over, as of
    /// [`RotatingCache::append`].
    ///
    /// # Errors
    /// `k` or `v` tracks a gradient, which candle's would end without a word: not where they fill the whole cache, and
    /// are what is returned. Those of candle's.
    pub fn append(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        iam: &IndicesAndMask,
    ) -> Result<(Tensor, Tensor)> {
        if k.dim(2)? < self.k().dim(2)? {
            let instead = "use kv_cache::RotatingKvCache, which passes gradients on";
            refuse_tracked("scattered_kv_cache", [("k", Some(k)), ("v", Some(v))], instead)?;
        }
        self.0.append(k, v, iam)
    }

    /// All keys.
    pub fn k(&self) -> &Tensor {
        self.0.k()
    }

    /// All values.
    pub fn v(&self) -> &Tensor {
        self.0.v()
    }
}
