package sandbox

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// dropPrivileges sets no_new_privs, becomes the user and drops every
// capability but the one that lets root open the files of others, until Seal.
func dropPrivileges(p Policy) error {
	u := p.User
	have := cap.GetProc()
	keep := cap.NewSet()
	for _, v := range openers(p) {
		if ok, err := have.GetFlag(cap.Permitted, v); err == nil && ok {
			if err := keep.SetFlag(cap.Permitted, true, v); err != nil {
				return err
			}
			if err := keep.SetFlag(cap.Effective, true, v); err != nil {
				return err
			}
		}
	}
	if ok, err := have.GetFlag(cap.Effective, cap.SETPCAP); err == nil && ok {
		for v := cap.Value(0); v < cap.MaxBits(); v++ {
			if err := cap.DropBound(v); err != nil {
				return fmt.Errorf("bounding set: %w", err)
			}
		}
	}
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("ambient set: %w", err)
	}
	if u != nil && (u.UID != os.Geteuid() || u.GID != os.Getegid()) {
		if err := cap.SetGroups(u.GID); err != nil {
			return fmt.Errorf("becoming group %d: %w", u.GID, err)
		}
		if err := cap.SetUID(u.UID); err != nil {
			return fmt.Errorf("becoming user %d: %w", u.UID, err)
		}
	}
	if err := keep.SetProc(); err != nil {
		return err
	}
	_, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1)
	return err
}

// openers are the capabilities by which root opens what belongs to others. A
// program of somebody else's gets none.
func openers(p Policy) []cap.Value {
	switch {
	case len(p.Exec) > 0:
		return nil
	case len(p.Write)+len(p.Change) > 0:
		return []cap.Value{cap.DAC_OVERRIDE}
	}
	return []cap.Value{cap.DAC_READ_SEARCH}
}

// dropAll drops every capability.
func dropAll() error { return cap.NewSet().SetProc() }
