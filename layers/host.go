package layers

import "fmt"

// Role is what a byte range of an image file is used for.
type Role uint8

const (
	RoleHeader        Role = iota + 1 // the header with its extensions
	RoleMap                           // BAT, L1 or L2 table
	RoleData                          // guest data
	RolePacked                        // compressed guest data
	RoleRefcountTable                 // top level of the reference counts
	RoleRefcountBlock                 // reference counts
	RoleSnapshotTable                 // table of internal snapshots
	RoleSnapshotMap                   // L1 or L2 reached only through a snapshot
	RoleBitmap                        // dirty-bitmap directory, table or bits
	RoleExtension                     // anything else the header names
)

func (r Role) String() string {
	names := [...]string{"", "header", "map", "data", "packed", "refcount table",
		"refcount block", "snapshot table", "snapshot map", "bitmap", "extension"}
	if int(r) < len(names) && r > 0 {
		return names[r]
	}
	return fmt.Sprintf("role(%d)", uint8(r))
}

// HostRange is one reference to a range of the image file.
type HostRange struct {
	Off, Len int64 // bytes of the image file
	Role     Role
	Guest    int64  // guest offset for RoleData and RolePacked of the active map, else -1
	Snapshot string // id of the snapshot through which it is reached, "" for the active state
}
