package backend

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// QEMU's lock bytes. A lock belongs to the open file description (F_OFD_*),
// not to the process: two opens in one process exclude each other, and
// closing another descriptor of the file loses nothing. All locks are read
// locks, which never exclude one another; a conflict is found by testing
// whether a write lock would succeed. So a lock is visible to every program
// without keeping any from announcing its own, and it works on a descriptor
// that is open for reading only.
const (
	lockUse     = 100 // + n: holder uses permission n
	lockUnshare = 200 // + n: holder does not share permission n
)

// Lock is Locker.
func (o *osFile) Lock(use, unshare Perm) error {
	if (use|unshare)&^permAll != 0 {
		return pathErr("lock", o.name, unix.EINVAL)
	}
	o.lockMu.Lock()
	defer o.lockMu.Unlock()
	oldUse, oldUnshare := o.use, o.unsh
	// Announce first, then test: two programs that do this at once may both
	// fail but never both succeed.
	err := o.announce(oldUse|use, oldUnshare|unshare)
	if err == nil {
		err = o.conflict(use, unshare)
	}
	if err != nil {
		if rerr := o.announce(oldUse, oldUnshare); rerr != nil {
			err = errors.Join(err, rerr)
		}
		return pathErr("lock", o.name, err)
	}
	return pathErr("lock", o.name, o.announce(use, unshare))
}

// Unlock is Locker.
func (o *osFile) Unlock() error {
	o.lockMu.Lock()
	defer o.lockMu.Unlock()
	return pathErr("unlock", o.name, o.announce(0, 0))
}

// announce makes the held bytes exactly those of use and unshare, as far as
// it gets.
func (o *osFile) announce(use, unshare Perm) error {
	if err := o.lockBytes(lockUse, &o.use, use); err != nil {
		return err
	}
	return o.lockBytes(lockUnshare, &o.unsh, unshare)
}

func (o *osFile) lockBytes(base int64, have *Perm, want Perm) error {
	for n := range 8 {
		bit := Perm(1) << n
		if (*have^want)&bit == 0 {
			continue
		}
		l := unix.Flock_t{Type: unix.F_RDLCK, Start: base + int64(n), Len: 1}
		if want&bit == 0 {
			l.Type = unix.F_UNLCK
		}
		err := o.control(func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
			// No program of this protocol holds a write lock.
			return fmt.Errorf("%w: another program holds a write lock over byte %d (%w)", ErrInUse, l.Start, err)
		case err != nil:
			return lockErr(err)
		}
		*have ^= bit
	}
	return nil
}

// conflict tests whether somebody else refuses what we use or uses what we
// refuse.
func (o *osFile) conflict(use, unshare Perm) error {
	for n := range 8 {
		bit := Perm(1) << n
		if use&bit != 0 {
			if who, err := o.holder(lockUnshare + int64(n)); err != nil {
				return err
			} else if who != "" {
				return fmt.Errorf("%w: %s does not share %q", ErrInUse, who, bit)
			}
		}
		if unshare&bit != 0 {
			if who, err := o.holder(lockUse + int64(n)); err != nil {
				return err
			} else if who != "" {
				return fmt.Errorf("%w: %s uses %q", ErrInUse, who, bit)
			}
		}
	}
	return nil
}

// holder says who besides this open file description holds a lock over the
// byte at off; "" is nobody.
func (o *osFile) holder(off int64) (string, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: off, Len: 1}
	err := o.control(func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) })
	switch {
	case err != nil:
		return "", lockErr(err)
	case l.Type == unix.F_UNLCK:
		return "", nil
	case l.Pid > 0: // a traditional lock; those of descriptions have no owner
		return fmt.Sprintf("process %d", l.Pid), nil
	}
	return "another program", nil
}

// lockErr tells "there are no such locks here" from other failures: EINVAL is
// a kernel before 3.15, ENOLCK a network filesystem without a lock manager.
func lockErr(err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOLCK) {
		return fmt.Errorf("no open file description locks here: %w (%w)", errors.ErrUnsupported, err)
	}
	return err
}
