//! Who may open the file of a Unix socket.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::ValueError;

/// The permissions of a socket's file, in octal; who may write to it may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(u32);

impl SocketMode {
    /// The process's own user and group.
    pub const DEFAULT: Self = Self(0o660);

    /// The bits, at most 0777.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for SocketMode {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let octal = !text.is_empty() && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
        u32::from_str_radix(text, 8)
            .ok()
            .filter(|bits| octal && *bits <= 0o777)
            .map(Self)
            .ok_or_else(|| {
                ValueError::new(
                    format!("'{text}' is not a file mode"),
                    "octal permissions such as 0660, at most 0777",
                )
            })
    }
}

impl Serialize for SocketMode {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// Whom a socket's file is given to, by name or number; looked up on the host where it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketOwner {
    /// The user.
    pub user: Option<String>,
    /// The group.
    pub group: Option<String>,
}

impl fmt::Display for SocketOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.user.as_deref().unwrap_or_default())?;
        match &self.group {
            Some(group) => write!(f, ":{group}"),
            None => Ok(()),
        }
    }
}

impl FromStr for SocketOwner {
    type Err = ValueError;

    /// `user`, `user:group` or `:group`.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let is_name = |name: &str| {
            !name.is_empty() && !name.contains(|c: char| c == ':' || c == '/' || c.is_whitespace())
        };
        let fits = match group {
            Some(group) => is_name(group) && (user.is_empty() || is_name(user)),
            None => is_name(user),
        };
        if !fits {
            return Err(ValueError::new(
                format!("'{text}' is not an owner"),
                "user, user:group or :group such as :haproxy",
            ));
        }
        Ok(Self {
            user: (!user.is_empty()).then(|| user.to_owned()),
            group: group.map(str::to_owned),
        })
    }
}

impl Serialize for SocketOwner {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_owners() {
        for (text, bits) in [("660", 0o660), ("0600", 0o600), ("777", 0o777), ("0", 0)] {
            assert_eq!(text.parse::<SocketMode>().unwrap().get(), bits);
        }
        for bad in ["", "8", "1777", "rw", "-1", "+7", "0x1"] {
            assert!(bad.parse::<SocketMode>().is_err(), "{bad}");
        }
        for text in ["haproxy", "haproxy:www-data", ":haproxy", "99:99"] {
            assert_eq!(text.parse::<SocketOwner>().unwrap().to_string(), text);
        }
        for bad in ["", ":", "a:", "a:b:c", "a b", "/x"] {
            assert!(bad.parse::<SocketOwner>().is_err(), "{bad}");
        }
    }
}
