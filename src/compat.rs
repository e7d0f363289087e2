//! The command lines of the programs that this one replaces, and the names it is called by then.
//!
//! Pure: words in, an [`Invocation`] or a complaint out. Must not know: files, the kernel, what a relay does.

pub mod flags;
mod listen;
mod number;

use std::ffi::OsStr;
use std::path::Path;

pub use flags::{Ancestor, Destination, FlagError, Invocation, Listening, Relay, parse};
pub use listen::{Place, places, relay_name};

/// A name under which the old flags are understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldName {
    /// `go-mmproxy`: path-network's and kzemek's.
    GoMmproxy,
    /// `mmproxy`: Cloudflare's, mmproxy-rs, and the one with a JSON file.
    Mmproxy,
}

impl OldName {
    /// Both, as `mmproxyctl link` makes them.
    pub const ALL: [Self; 2] = [Self::GoMmproxy, Self::Mmproxy];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::GoMmproxy => "go-mmproxy",
            Self::Mmproxy => "mmproxy",
        }
    }

    /// The old name that the program's own name ends in, where it is one.
    pub fn of(argv0: &OsStr) -> Option<Self> {
        let called = Path::new(argv0).file_name()?;
        Self::ALL.into_iter().find(|name| called == name.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_count_without_their_directory() {
        for (argv0, name) in [
            ("go-mmproxy", Some(OldName::GoMmproxy)),
            ("/opt/mmproxy/bin/go-mmproxy", Some(OldName::GoMmproxy)),
            ("./mmproxy", Some(OldName::Mmproxy)),
            ("mmproxyctl", None),
            ("/opt/go-mmproxy/mmproxyctl", None),
            ("", None),
        ] {
            assert_eq!(OldName::of(OsStr::new(argv0)), name, "{argv0}");
        }
    }
}
