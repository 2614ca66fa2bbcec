//! Words of memory that other CPUs and userspace read and write at the same time: the words of a
//! map.
//!
//! A reference to an ordinary value tells the compiler that nobody else writes the value. So no
//! reference to an ordinary value may point into a map. A reference to the value's *shared form*
//! ([`Share::Shared`]) may: the shared form has the same fields in the same places, each in a
//! [`Word`].

use core::cell::UnsafeCell;
use core::fmt;

use bytemuck::Pod;

use crate::packet::atomic;

/// A type with a shared form.
///
/// # Safety
/// `Shared` has the layout of the type itself, and consists of [`Word`]s.
pub unsafe trait Share: Copy {
    /// The same value, word by word.
    type Shared;

    /// This value in its shared form, for functions that work on shared values.
    #[inline(always)]
    fn shared(&mut self) -> &Self::Shared {
        // SAFETY: the layouts are the same, and the borrow leaves no other access than by the
        // words.
        unsafe { &*(&raw mut *self).cast() }
    }

    /// A copy of this value in its shared form.
    #[inline(always)]
    fn to_shared(&self) -> Self::Shared {
        // SAFETY: the layouts are the same, and every bit pattern of a word is one of its integer.
        unsafe { (&raw const *self).cast::<Self::Shared>().read() }
    }
}

/// An integer that others may write at any time. Each read may find another number, but never half
/// of one.
#[repr(transparent)]
pub struct Word<T>(UnsafeCell<T>);

impl<T: Pod> Word<T> {
    /// The number that is there now.
    #[inline(always)]
    pub fn get(&self) -> T {
        // SAFETY: the place is live and aligned as long as the reference, nobody makes a plain
        // reference to the place, and the place is no larger than a machine word: [`Share`] is
        // implemented for integers only. A volatile access of that size is one instruction, done
        // once and where it stands. So the compiler assumes nothing of the number, and every bit
        // pattern is a number.
        unsafe { self.0.get().read_volatile() }
    }

    /// Writes the number. If another CPU writes at the same time, one of the two numbers is lost.
    #[inline(always)]
    pub fn set(&self, value: T) {
        // SAFETY: as for `get`.
        unsafe { self.0.get().write_volatile(value) }
    }
}

impl Word<u32> {
    /// Writes `new` if the word is still `old`. Returns the word that was there before. A full
    /// barrier.
    #[inline(always)]
    pub fn compare_exchange(&self, old: u32, new: u32) -> u32 {
        // SAFETY: as for `get`.
        unsafe { atomic::compare_exchange(self.0.get(), old, new) }
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for Word<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

macro_rules! integers {
    ($($integer:ty),*) => {
        $(
            // SAFETY: `Word` is transparent.
            unsafe impl Share for $integer {
                type Shared = Word<Self>;
            }
        )*
    };
}

integers!(u8, u16, u32, u64);

// SAFETY: the elements have the same layout.
unsafe impl<T: Share, const N: usize> Share for [T; N] {
    type Shared = [T::Shared; N];
}

/// A map type and its shared form: a structure with the same fields in the same order, `repr(C)` as
/// well.
macro_rules! shared {
    (
        $(#[$type_meta:meta])*
        pub struct $name:ident, shared as $shared:ident $(align($align:literal))? {
            $( $(#[doc = $doc:literal])* $(#[cfg($cfg:meta)])? pub $field:ident: $type:ty, )*
        }
    ) => {
        $(#[$type_meta])*
        #[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C $(, align($align))?)]
        pub struct $name {
            $( $(#[doc = $doc])* $(#[cfg($cfg)])? pub $field: $type, )*
        }

        #[doc = concat!("The shared form of [`", stringify!($name), "`].")]
        #[derive(Debug)]
        #[repr(C $(, align($align))?)]
        pub struct $shared {
            $(
                $(#[cfg($cfg)])?
                #[doc = concat!("See [`", stringify!($name), "::", stringify!($field), "`].")]
                pub $field: <$type as $crate::shared::Share>::Shared,
            )*
        }

        // SAFETY: `repr(C)` with the same alignment and fields of the same layouts.
        unsafe impl $crate::shared::Share for $name {
            type Shared = $shared;
        }

        const _: () = assert!(
            size_of::<$name>() == size_of::<$shared>() && align_of::<$name>() == align_of::<$shared>()
        );
    };
}

pub(crate) use shared;

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;
    use crate::flow::Flow;

    #[test]
    fn a_word_stands_where_its_field_does() {
        let mut plain = Flow::zeroed();
        (plain.live.bytes, plain.live.window, plain.fixed.to_source) = (1 << 40, 3, [4, 5, 6, 7]);
        let words = plain.shared();
        assert_eq!((words.live.bytes.get(), words.live.window.get()), (1 << 40, 3));
        assert_eq!(words.fixed.to_source[2].get(), 6);
        words.fixed.to_source[1].set(50);
        words.fixed.window_left.set(14);
        let found = [(7, 70), (7, 71)].map(|(old, new)| words.fixed.to_source[3].compare_exchange(old, new));
        assert_eq!(found, [7, 70]);

        plain.to_shared().live.bytes.set(0);
        assert_eq!((plain.fixed.to_source, plain.fixed.window_left), ([4, 50, 6, 70], 14));
        assert_eq!((plain.live.bytes, plain.live.window, plain.fixed.output), (1 << 40, 3, 0));
    }
}
