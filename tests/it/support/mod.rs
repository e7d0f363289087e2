//! What the tests share.

pub(crate) mod malformed;
pub(crate) mod net;
