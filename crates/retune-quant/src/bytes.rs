//! Bytes that many matrices share: slices of one memory map, file or vector, each keeping the whole alive.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// What owns bytes; its `as_ref` must give the same bytes each time.
pub trait ByteOwner: AsRef<[u8]> + Send + Sync {
    /// Gives back memory whose contents can be had again, from a file.
    fn release(&self) {}
}

impl ByteOwner for Vec<u8> {}

/// Read-only bytes and a share in whatever owns them. Cloning and slicing copy nothing.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn ByteOwner>,
    range: Range<usize>,
}

impl SharedBytes {
    /// All bytes of `owner`.
    pub fn new(owner: Arc<dyn ByteOwner>) -> Self {
        let all: &[u8] = (*owner).as_ref();
        let range = 0..all.len();
        Self { owner, range }
    }

    /// The bytes of a vector.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Self::new(Arc::new(bytes))
    }

    /// `values` as little-endian bytes; where the machine stores them so, they are not copied.
    pub(crate) fn from_f32(values: Vec<f32>) -> Self {
        if cfg!(target_endian = "little") {
            Self::new(Arc::new(F32Bytes(values)))
        } else {
            Self::from_vec(values.into_iter().flat_map(f32::to_le_bytes).collect())
        }
    }

    /// Gives back the memory of all of the owner's bytes, where they can be read again.
    pub fn release(&self) {
        self.owner.release();
    }

    /// The part `range` of these bytes, or `None` where they do not reach so far.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self { owner: Arc::clone(&self.owner), range: start..start + range.len() })
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = (*self.owner).as_ref();
        &all[self.range.clone()]
    }
}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBytes({} bytes)", self.range.len())
    }
}

/// Little-endian bytes as f32, without a copy, or `None` where address, length or machine do not allow it.
pub(crate) fn as_f32(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every pattern of 32 bits is an f32.
    let (before, values, after) = unsafe { bytes.align_to::<f32>() };
    (cfg!(target_endian = "little") && before.is_empty() && after.is_empty()).then_some(values)
}

/// A vector of f32 seen as its bytes.
struct F32Bytes(Vec<f32>);

impl ByteOwner for F32Bytes {}

impl AsRef<[u8]> for F32Bytes {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: an f32 has no padding, so all the vector's bytes are initialised; u8 needs no alignment.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), size_of_val(self.0.as_slice())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_relative_and_checked() {
        let bytes = SharedBytes::from_vec((0..10).collect());
        let middle = bytes.slice(2..8).unwrap();
        assert_eq!(&*middle, [2, 3, 4, 5, 6, 7]);
        assert_eq!(&*middle.slice(1..3).unwrap(), [3, 4]);
        assert!(middle.slice(6..6).unwrap().is_empty());
        assert!(middle.slice(0..7).is_none());
        assert!(middle.slice(7..7).is_none());
        assert!(middle.slice(usize::MAX..usize::MAX).is_none());
        assert!(middle.slice(Range { start: 3, end: 2 }).is_none());
    }

    #[test]
    fn a_slice_outlives_what_it_was_cut_from() {
        let part = SharedBytes::from_vec(vec![1, 2, 3]).slice(1..3).unwrap();
        assert_eq!(&*part, [2, 3]);
    }

    #[test]
    fn floats_are_stored_little_endian() {
        let bytes = SharedBytes::from_f32(vec![1.0, -2.5]);
        assert_eq!(&*bytes, [1.0f32.to_le_bytes(), (-2.5f32).to_le_bytes()].concat());
    }

    #[test]
    fn floats_are_borrowed_only_when_whole_and_aligned() {
        let bytes = SharedBytes::from_f32(vec![1.0, 2.0, 3.0]);
        if cfg!(target_endian = "little") {
            assert_eq!(as_f32(&bytes), Some([1.0, 2.0, 3.0].as_slice()));
            assert_eq!(as_f32(&bytes[4..]), Some([2.0, 3.0].as_slice()));
        }
        assert_eq!(as_f32(&bytes[1..9]), None);
        assert_eq!(as_f32(&bytes[..7]), None);
    }
}
