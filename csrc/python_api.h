// Python's interface, of which native code takes the stable one only (abi3).
#pragma once
#include <Python.h>

// What is Python's here is weak, so that a C++ program without Python can load the library for its operators: there
// these names are nothing, and nobody calls the functions that need them.
#pragma weak PyArg_ParseTuple
#pragma weak PyArg_ParseTupleAndKeywords
#pragma weak PyBytes_AsString
#pragma weak PyCapsule_GetPointer
#pragma weak PyCapsule_New
#pragma weak PyDict_SetItemString
#pragma weak PyErr_Clear
#pragma weak PyErr_ExceptionMatches
#pragma weak PyErr_Format
#pragma weak PyErr_Occurred
#pragma weak PyEval_RestoreThread
#pragma weak PyEval_SaveThread
#pragma weak PyExc_Exception
#pragma weak PyExc_TypeError
#pragma weak PyExc_ValueError
#pragma weak PyFloat_FromDouble
#pragma weak PyList_Append
#pragma weak PyList_GetItem
#pragma weak PyList_New
#pragma weak PyList_SetItem
#pragma weak PyList_Size
#pragma weak PyLong_AsLong
#pragma weak PyLong_AsLongLong
#pragma weak PyLong_FromLongLong
#pragma weak PyModule_AddIntConstant
#pragma weak PyModule_AddObject
#pragma weak PyModule_Create2
#pragma weak PyObject_CallFunctionObjArgs
#pragma weak PyObject_IsTrue
#pragma weak PyTuple_GetItem
#pragma weak PyTuple_New
#pragma weak PyTuple_SetItem
#pragma weak PyTuple_Size
#pragma weak PyUnicode_AsUTF8AndSize
#pragma weak PyUnicode_AsUTF8String
#pragma weak PyUnicode_FromFormat
#pragma weak PyUnicode_FromString
#pragma weak Py_BuildValue
#pragma weak _Py_Dealloc
#pragma weak _Py_NoneStruct
#pragma weak _Py_TrueStruct
