//! The control socket: how one `mmproxyctl` talks to another that runs relays.
//!
//! One Unix socket per running process, `NAME@NETNS.sock` in the runtime directory. Requests and
//! responses are JSON, one a line, in turn; a connection may carry any number of them.
//!
//! ```text
//! → {"command":"reload"}
//! ← {"ok":{"started":["web"],"stopped":[],"changed":[],"unchanged":3}}
//! → {"command":"reload"}
//! ← {"error":{"kind":"configuration","message":"error: …"}}
//! ```
//!
//! Who is neither root nor the user of the process, or sends what is no request (another command, an
//! unknown field, no JSON, a line above [`server::MAX_REQUEST`] bytes), is closed without an answer.
//!
//! Owns: framing, limits, who may ask. Must not know: what a request leads to.

pub mod client;
pub mod messages;
pub mod server;
