//! What can be asked over the control socket, and the form of answers.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::overview::Sort;
use crate::relay::view::Filter;

/// A request: `{"command":"…", …}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Read the files again and apply the difference; answers with what changed.
    Reload {},
    /// Start the program's file anew beside this process, hand it the listening sockets, and drain.
    Upgrade {},
    /// Stop accepting, give up every lock, and drain without a time limit; whoever comes next runs the instances.
    Release {},
    /// The state of every instance; answers with [`crate::overview::Process`].
    Status {},
    /// Open connections; answers with [`crate::overview::Listing`].
    Conns(Conns),
    /// Ends open connections, each with a reset on both sides; answers with those that it meant, in the
    /// form of `conns`.
    ConnsKill {
        /// Of these instances; none means of all.
        #[serde(default)]
        instances: Vec<String>,
        /// Which; what restricts nothing means every connection.
        #[serde(default)]
        filter: Filter,
    },
    /// Open connections and those that ended not long ago; answers with [`crate::overview::Explanation`].
    Explain {
        /// Which.
        #[serde(default)]
        filter: Filter,
    },
}

/// What `conns` lists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Conns {
    /// Of these instances; none means of all.
    pub instances: Vec<String>,
    /// Which.
    pub filter: Filter,
    /// In which order.
    pub sort: Sort,
    /// At most so many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// An answer: `{"ok":…}` or `{"error":{"kind":…,"message":…}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// It was done; what there is to say about it.
    Ok(Value),
    /// It was not done, and nothing was changed.
    Error(Failure),
}

/// Why a request was not followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Whose it is to mend.
    pub kind: FailureKind,
    /// For a person; may have several lines.
    pub message: String,
}

/// Whose a failure is to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// A mistake in the files.
    Configuration,
    /// Anything else.
    Failed,
}

impl Response {
    /// What was done, as JSON.
    pub fn ok(value: &impl Serialize) -> Self {
        match serde_json::to_value(value) {
            Ok(value) => Self::Ok(value),
            Err(error) => Self::failed(format!("cannot write the answer: {error}")),
        }
    }

    /// A failure of the system.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::Error(Failure {
            kind: FailureKind::Failed,
            message: message.into(),
        })
    }

    /// Mistakes in the files.
    pub fn configuration(message: impl Into<String>) -> Self {
        Self::Error(Failure {
            kind: FailureKind::Configuration,
            message: message.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_are_requests() {
        let parse = serde_json::from_str::<Request>;
        assert_eq!(
            parse(r#"{"command":"reload"}"#).unwrap(),
            Request::Reload {}
        );
        let Request::Conns(conns) =
            parse(r#"{"command":"conns","filter":{"client":"203.0.113.0/24"},"sort":"bytes"}"#)
                .unwrap()
        else {
            panic!("not conns")
        };
        assert_eq!(conns.sort, Sort::Bytes);
        assert!(!conns.filter.is_everything());
        for bad in [
            "",
            "{}",
            "reload",
            r#""reload""#,
            r#"{"command":"format"}"#,
            r#"{"command":"reload","force":true}"#,
            r#"{"command":"conns","cleint":"::/0"}"#,
            r#"{"command":"conns-kill","filter":{"cleint":"::/0"}}"#,
            r#"{"command":"conns","sort":"luck"}"#,
            r#"{"command":"conns","limit":-1}"#,
            r#"[{"command":"reload"}]"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn answers_are_told_apart() {
        let text = serde_json::to_string(&Response::configuration("line 3")).unwrap();
        assert_eq!(
            text,
            r#"{"error":{"kind":"configuration","message":"line 3"}}"#
        );
        let text = serde_json::to_string(&Response::ok(&[1])).unwrap();
        assert_eq!(text, r#"{"ok":[1]}"#);
    }
}
