// Package sandbox takes from a process what it does not need for reading
// images, before and after it reads their first byte.
//
// Design note. Whoever makes an image may find a defect in the code that reads
// it; what such code could then do is decided here. There are two steps.
//
// Confine comes before the first byte of an image is looked at. It changes the
// user where that was asked for, drops every capability but the one by which
// root opens the files of others, sets no_new_privs, leaves by Landlock only
// the directories of the image (no other file, no TCP, no signals to others)
// and refuses by seccomp everything that makes processes, connections, mounts,
// or reaches into the kernel or into other processes.
//
// Seal comes when everything is open. It drops the last capability and refuses
// every system call that takes a path. From then on the process works on the
// descriptors that it has.
//
// Both hold for all threads, those of C libraries included: capabilities and
// Landlock through psx (which needs to list its threads in /proc, therefore
// /proc can be listed, not read), seccomp through its own flag. Neither can be
// undone; whatever needs more (mounting, loop devices) is the business of
// another process, see package cmd/mount-image.
//
// The filters name what is refused, not what is allowed: a new version of Go's
// runtime or of the C library must not be able to break a server that holds
// somebody's disk. What is refused gives EPERM (ENOSYS where libraries then
// fall back to an older call), which the caller sees as an ordinary error.
package sandbox

import (
	"errors"
	"fmt"
	"os/user"
	"strconv"
)

// Mode is how much a user insists on isolation.
type Mode string

// The modes.
const (
	Auto    Mode = "auto"    // as much as the kernel offers
	Require Mode = "require" // all of it, or an error
	Off     Mode = "off"     // nothing
)

// ErrUnavailable reports that something that Require requires is missing.
var ErrUnavailable = errors.New("isolation is not available")

// Policy is what a process may still do after Confine. All paths exist; a
// directory stands for everything below it.
type Policy struct {
	Mode  Mode
	List  []string // directories whose names may be read
	Read  []string // directories and files that may be read
	Write []string // directories and files that may be written; in directories regular files may be made
	// Change are directories in which files and directories may also be made,
	// renamed and removed, and the permissions of files changed.
	Change []string
	// Exec are the programs that may be run, instead of the present one: the
	// file itself, and what loads it. nil is none. Processes cannot be made.
	Exec []string
	// Rings says that io_urings that were made before stay usable. They must
	// have been restricted, for what they do no filter sees.
	Rings bool
	// User to become; nil stays.
	User *User
}

// User is whom a process becomes, without any supplementary group.
type User struct{ UID, GID int }

// LookupUser finds a user by name or number. A number that no account has
// stands for itself, with a group of the same number.
func LookupUser(name string) (*User, error) {
	u, err := user.Lookup(name)
	if err != nil {
		n, numeric := strconv.ParseUint(name, 10, 31)
		if numeric != nil {
			return nil, fmt.Errorf("user %q: %w", name, err)
		}
		if u, err = user.LookupId(name); err != nil {
			return &User{int(n), int(n)}, nil
		}
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 31)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 31)
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("user %q: %w", name, err)
	}
	return &User{int(uid), int(gid)}, nil
}

// Confine restricts the process to the policy. The warnings say, in one line
// each, what of it this system does not offer; with Require they are an error
// that wraps ErrUnavailable. Becoming another user is never optional.
func Confine(p Policy) (warnings []string, err error) {
	if p.Mode == Off {
		if p.User != nil {
			return nil, errors.New("changing the user needs the sandbox")
		}
		return nil, nil
	}
	missing := func(what string, err error) error {
		if p.Mode == Require {
			return fmt.Errorf("%w: %s: %w", ErrUnavailable, what, err)
		}
		warnings = append(warnings, fmt.Sprintf("sandbox: %s: %v; going on with less isolation", what, err))
		return nil
	}
	if err := dropPrivileges(p); err != nil {
		if p.User != nil {
			return nil, err
		}
		if err := missing("capabilities", err); err != nil {
			return nil, err
		}
	}
	if err := restrictFiles(p); err != nil {
		if err := missing("Landlock", err); err != nil {
			return nil, err
		}
	}
	if err := install(confineRules(p)); err != nil {
		if err := missing("seccomp", err); err != nil {
			return nil, err
		}
	}
	return warnings, nil
}

// Seal drops what a confined process has needed for opening files. mode is
// that of the policy; what Confine has warned of is not repeated.
func Seal(mode Mode) error {
	if mode == Off {
		return nil
	}
	err := errors.Join(dropAll(), install(sealRules()))
	if err != nil && mode == Require {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}
