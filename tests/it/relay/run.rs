//! `mmproxyctl run`: from the files to a drained end.
